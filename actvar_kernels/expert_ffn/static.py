"""Run an FFN of which every token uses the same hidden units, the first ones."""

from __future__ import annotations

import functools

import torch

from actvar_kernels.backend import choose, choose_eight_bits
from actvar_kernels.checks import expect_count, expect_one_device, expect_shape, expect_tensor
from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.expert_ffn import cpu_brgemm, eight_bits, reference
from actvar_kernels.expert_ffn.op import as_autocast, run_ffn, why_not_in_cpp
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.triton_backend.row_form import ByteRows, values_of


def static_ffn(
    u: torch.Tensor | ByteRows,
    active: int,
    num_experts: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    quantized: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the FFN of the first `active` of `num_experts` equal groups of hidden units, for every token.

    The result is that of `expert_ffn` with a mask of the first experts. The products are smaller ones without a mask:
    PyTorch's on a GPU, and C++ on the CPU, which keeps a packed copy of these units. In eight bits the layers are
    quantized as layers of these units alone.

    Args:
        u: `[..., C]`, floating-point; or such rows in eight bits, on Triton.
        active: groups that are on, 1 ... `num_experts`.
        num_experts: N, a divisor of D.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`, in u's dtype, or in any under
            autocast.
        quantized: `torch.int8` or `torch.float8_e4m3fn` for both products in eight bits.

    Returns:
        `[..., C]` in u's dtype, or in that of autocast.

    Raises:
        ValueError: shapes or devices that do not fit, or N that does not divide D.
        BackendUnavailableError: see `actvar_kernels.set_backend`, and `backend.choose_eight_bits`.
    """
    weights = FFNWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    active = _checked(u, active, num_experts, weights)
    units = fc1_weight.shape[0] // num_experts * active
    if quantized is not None:
        u = u if isinstance(u, ByteRows) else as_autocast(u)[0]
        backend = choose_eight_bits("static_ffn", quantized, u.scales if isinstance(u, ByteRows) else u, *weights)
        if backend.name == "triton":
            return eight_bits.expert_ffn(u, None, _kept(weights, units), quantized, backend.recorded)
    assert isinstance(u, torch.Tensor)
    every = u.new_ones(*u.shape[:-1], 1, dtype=torch.bool)  # the units that are on, as one expert
    if quantized is not None:
        if backend.name == "reference":
            return reference.quantized_expert_ffn(u, every, *weights.first(units), quantized)
        return cpu_brgemm.expert_ffn(u, every, _kept(weights, units), int8=True, skips=False)
    backend = choose(
        "static_ffn",
        u,
        *weights,
        why_not_in_cpp=functools.partial(why_not_in_cpp, u, weights),
        library_on_triton=True,
        has_operator=False,
    )
    if backend.name == "reference":
        return reference.static_ffn(u, units, *weights)
    (u,) = as_autocast(u)
    return run_ffn(backend, u, every, _kept(weights, units))


def _checked(rows: torch.Tensor | ByteRows, active: int, num_experts: int, weights: FFNWeights) -> int:
    """Return `active` as an int; raise unless the arguments fit each other."""
    u = values_of(rows)
    expect_tensor("u", u)
    expect_shape("fc1_weight", weights.fc1_weight, (None, None))
    D, C = weights.fc1_weight.shape
    expect_shape("u", u, (*u.shape[:-1], C))
    for name, shape in (("fc1_bias", (D,)), ("fc2_weight", (C, D)), ("fc2_bias", (C,))):
        expect_shape(name, getattr(weights, name), shape)
    if D % num_experts:
        raise ValueError(f"num_experts: expected a divisor of the hidden size {D}, got {num_experts}")
    expect_one_device(u, *weights)
    return expect_count("active", active, num_experts)


def _kept(weights: FFNWeights, units: int) -> FFNWeights:
    """Return the same views of the first hidden units at every call, so that packed copies stay; or all `weights`.

    They are made anew when the weights change. As views of detached tensors they do not keep the weights alive.
    """
    if units == len(weights.fc1_bias):
        return weights
    detached = FFNWeights(*(tensor.detach() for tensor in weights))
    return packed(weights, ("first units", units), lambda: detached.first(units))
