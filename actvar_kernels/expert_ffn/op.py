"""Run the FFN as experts: hidden units cut into equal groups, of which each token uses a few."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, choose_eight_bits, in_kernel_dtypes
from actvar_kernels.checks import expect_count, expect_index, expect_one_device, expect_shape, expect_tensor
from actvar_kernels.constants import MAX_EXPERTS
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.expert_ffn import cpu_brgemm, cpu_kernel, eight_bits, reference
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.scatter.op import scatter_checked
from actvar_kernels.situation import wants_gradient
from actvar_kernels.triton_backend.row_form import ByteRows, values_of

SCHEDULES = ("auto", "dense", "tile_list")

_MOST_TOKENS = 64 * MOST_SEQUENCES
"""Tokens that the Triton kernels take, whose smallest tiles have 64."""
_LIMITS = f"float32, float16 and bfloat16, a bool mask of up to {MAX_EXPERTS} experts, {_MOST_TOKENS} tokens"


def expert_ffn(
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    quantized: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the sum of the chosen experts' outputs: `fc2_bias + sum_e mask_e gelu_tanh(u W1_e^T + b1_e) W2_e^T`.

    This is Eq. 4 of the paper. Expert e owns the e-th of N equal groups of the D hidden units. With every expert on,
    the result is that of the dense FFN.

    Triton takes two or three launches, for float32, float16 and bfloat16, bool masks and up to 32 experts. On the CPU a
    C++ kernel runs the chosen experts only, for the same dtypes, bool masks and even C. C++ keeps a packed copy of the
    weights, which is made anew when their versions, addresses or dtypes change. PyTorch does not count changes through
    `.data` and by fused optimizers: after these call `actvar.refresh` on the module of the weights.

    Args:
        u: `[..., C]`, floating-point; or such rows in eight bits, on Triton.
        mask: `[..., N]`: bool, or floating-point gates that multiply the experts' outputs (training).
        active: number of experts that are on for a token, 1 ... N; the FLOP count of a call is based on it.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`, in u's dtype, or in any under
            autocast; zeros for a bias that the layer does not have.
        quantized: `torch.int8` or `torch.float8_e4m3fn` for both products in eight bits, as
            `reference.quantized_expert_ffn` defines them, for a bool mask. Triton runs all experts then, in four
            launches, or three for rows in eight bits.

    Returns:
        `[..., C]` in u's dtype, or in that of autocast.

    Raises:
        ValueError: shapes or devices that do not fit, or N that does not divide D.
        TypeError: another dtype than that of the weights without autocast, a mask in eight bits that is not bool.
        BackendUnavailableError: see `actvar_kernels.set_backend`, and `backend.choose_eight_bits`.
    """
    weights = FFNWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    active = _expect_ffn(u, mask, active, weights)
    if quantized is not None:
        u, _, backend = _prepare_quantized("expert_ffn", u, mask, active, weights, quantized)
        return _run_quantized(backend, u, mask, active, weights, quantized)
    assert isinstance(u, torch.Tensor)
    return _ffn(_choose("expert_ffn", u, mask, weights), u, mask, active, weights)


def expert_ffn_scatter(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor | Residual,
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gamma: torch.Tensor,
    schedule: str = "auto",
    quantized: torch.dtype | None = None,
) -> torch.Tensor:
    """Return `rest` after `rest[r, index[r, j]] = rows[r, j] + gamma[r] * expert_ffn(u)[r, j]`.

    Triton takes two or three launches. There, and in C++, without gradients `rest` is written to and returned.

    Args:
        rest: `[R, L, C]`, the tokens that keep their value; None without an index.
        index: `[R, K]` int64 without repeats, where the rows belong; None when every row was kept: the result is
            `[R, K, C]`.
        rows: `[R, K, C]`, the kept rows before the FFN, or a `Residual` that gives them. A residual is what
            `add_normalize_route(..., deferred=True).rows` is; its x may be `rest`.
        u: `[R, K, C]`, the input of the FFN.
        mask: `[R, K, N]`, as in `expert_ffn`.
        active: number of experts that are on for a token, as in `expert_ffn`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: the weights, as in `expert_ffn`.
        gamma: `[R, 1, C]`, the gate of the branch by AdaLN.
        schedule: one of `SCHEDULES`, for the Triton backend. `"dense"` runs every expert and masks. `"tile_list"` skips
            experts that no row of a tile of sorted tokens wants. Both give results that are equal but for rounding.
            `"auto"` takes what a table of `actvar_kernels.tools.tune` says. Without a table it takes `"dense"`, which
            was faster on an H100 at every size.
        quantized: as in `expert_ffn`.

    Returns:
        `[R, L, C]` in the dtype of `rest`; without an index `[R, K, C]`.

    Raises:
        TypeError: an index that is not int64, another dtype of `u` than that of the weights without autocast, a mask in
            eight bits that is not bool.
        ValueError: shapes or devices that do not fit, N that does not divide D, an unknown schedule.
        BackendUnavailableError: see `actvar_kernels.set_backend`, and `backend.choose_eight_bits`.
    """
    if schedule not in SCHEDULES:
        hint = "; it was removed, use 'dense' or 'tile_list'" if schedule == "snap" else ""
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}{hint}")
    weights = FFNWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    active = _expect_ffn(u, mask, active, weights)
    parts = _expect_rows(rest, index, rows, u, gamma)
    x, update, gate = rows if isinstance(rows, Residual) else (rows, None, None)
    if quantized is not None:
        u, on, backend = _prepare_quantized("expert_ffn_scatter", u, mask, active, weights, quantized)
        if backend.name == "triton":
            out = _target(rest, index, x, u, gamma)
            eight_bits.expert_ffn_scatter(out, index, rows, u, on, weights, gamma, quantized, backend.recorded)
            return out
        rows = rows.rows(index) if isinstance(rows, Residual) else rows
        return scatter_checked(rest, index, rows, _run_quantized(backend, u, mask, active, weights, quantized), gamma)
    assert isinstance(u, torch.Tensor)
    backend = _choose("expert_ffn_scatter", u, mask, weights, *parts)
    if backend.name != "triton" or wants_gradient(u, *weights, *parts):  # what writes in place has no gradient
        rows = rows.rows(index) if isinstance(rows, Residual) else rows
        return scatter_checked(rest, index, rows, _ffn(backend, u, mask, active, weights), gamma)
    u, *weights = as_autocast(u, *weights)
    out = _target(rest, index, x, u, gamma)
    if backend.recorded:
        operator = torch.ops.actvar_kernels.expert_ffn_scatter
        operator(out, index, x, update, gate, u, mask, active, *weights, gamma, schedule)
    else:
        _scatter_on_triton(out, index, rows, u, mask, FFNWeights(*weights), gamma, schedule)
    return out


def _target(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    x: torch.Tensor,
    u: torch.Tensor | ByteRows,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return the tensor that Triton writes the result of `expert_ffn_scatter` to."""
    if index is not None and rest is not None:
        return rest if rest.stride(2) == 1 else rest.contiguous()
    dtype = torch.promote_types(x.dtype, torch.promote_types(gamma.dtype, u.dtype))
    return x.new_empty(values_of(u).shape, dtype=dtype)


def _expect_ffn(input_rows: torch.Tensor | ByteRows, mask: torch.Tensor, active: int, weights: FFNWeights) -> int:
    """Return `active` as an int; raise unless the arguments of an FFN fit each other."""
    u = values_of(input_rows)
    expect_tensor("u", u)
    expect_shape("fc1_weight", weights.fc1_weight, (None, None))
    D, C = weights.fc1_weight.shape
    expect_shape("u", u, (*u.shape[:-1], C))
    expect_shape("fc1_bias", weights.fc1_bias, (D,))
    expect_shape("fc2_weight", weights.fc2_weight, (C, D))
    expect_shape("fc2_bias", weights.fc2_bias, (C,))
    expect_shape("mask", mask, (*u.shape[:-1], None))
    if D % mask.shape[-1]:
        raise ValueError(f"mask: expected a number of experts that divides the hidden size {D}, got {mask.shape[-1]}")
    expect_one_device(u, mask, *weights)
    dtype = weights.fc1_weight.dtype
    if input_rows.dtype != dtype and not torch.is_autocast_enabled(u.device.type):
        raise TypeError(f"u: expected the dtype of the weights, {dtype}, or autocast, got {u.dtype}")
    return expect_count("active", active, mask.shape[-1])


def _expect_rows(base, index, rows, u, gamma) -> tuple[torch.Tensor, ...]:
    """Return the floating-point tensors beside those of the FFN; raise unless they fit `u`."""
    u = values_of(u)
    expect_shape("u", u, (None, None, None))
    R, K, C = u.shape
    if isinstance(rows, Residual):
        expect_shape("rows.x", rows.x, (R, K if index is None else None, C))
        expect_shape("rows.update", rows.update, (R, K, C))
        expect_shape("rows.gamma", rows.gamma, (R, 1, C))
        parts = (*rows, gamma)
    else:
        expect_shape("rows", rows, (R, K, C))
        parts = (rows, gamma)
    expect_shape("gamma", gamma, (R, 1, C))
    if index is not None:
        expect_index(index, (R, K))
        expect_shape("rest", base, (R, None, C))
        parts = (base, *parts)
    expect_one_device(u, index, *parts)
    return parts


def _choose(operation: str, u: torch.Tensor, mask: torch.Tensor, weights: FFNWeights, *parts: torch.Tensor) -> Backend:
    """Return the backend of a call with these tensors."""

    def takes_triton() -> bool:
        experts = mask.shape[-1]
        fits = mask.dtype == torch.bool and experts <= MAX_EXPERTS and mask.numel() <= experts * _MOST_TOKENS
        return fits and in_kernel_dtypes(u, *weights, *parts)

    return choose(
        operation,
        u,
        mask,
        *weights,
        *parts,
        takes_triton=takes_triton,
        limits=_LIMITS,
        why_not_in_cpp=lambda: why_not_in_cpp(u, weights, mask.dtype),
    )


def why_not_in_cpp(u: torch.Tensor, weights: FFNWeights, mask_dtype: torch.dtype = torch.bool) -> str | None:
    """Return why the C++ kernel does not take a call, or None.

    Args:
        u: input of the FFN, `[..., C]`.
        weights: of the FFN.
        mask_dtype: dtype of the mask.
    """
    dtype, weights_dtype = cpu.computed_dtype(u), weights.fc1_weight.dtype
    same = weights_dtype == dtype or torch.is_autocast_enabled("cpu")
    if dtype not in cpu.DTYPES or not same or mask_dtype != torch.bool or u.shape[-1] % 2:
        found = f"{dtype}, weights in {weights_dtype}, a mask in {mask_dtype} and width {u.shape[-1]}"
        return f"it takes {cpu.TAKEN}, weights alike, a bool mask and an even width, got {found}"
    return cpu.why_not()


def _prepare_quantized(
    operation: str,
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor,
    active: int,
    weights: FFNWeights,
    quantized: torch.dtype,
) -> tuple[torch.Tensor | ByteRows, torch.Tensor | None, Backend]:
    """Return the input, the mask where any expert is off, and the backend of a call in eight bits."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, which is all that eight bits take, got {mask.dtype}")
    on = mask if active < mask.shape[-1] else None
    if isinstance(u, ByteRows):
        return u, on, choose_eight_bits(operation, quantized, u.scales, mask, *weights)
    (u,) = as_autocast(u)
    return u, on, choose_eight_bits(operation, quantized, u, mask, *weights)


def _run_quantized(
    backend: Backend,
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor,
    active: int,
    weights: FFNWeights,
    quantized: torch.dtype,
) -> torch.Tensor:
    """Return the FFN in eight bits."""
    skips = active < mask.shape[-1]
    if backend.name == "triton":
        return eight_bits.expert_ffn(u, mask if skips else None, weights, quantized, backend.recorded)
    assert isinstance(u, torch.Tensor)
    if backend.name == "reference":
        return reference.quantized_expert_ffn(u, mask, *weights, quantized)
    return cpu_brgemm.expert_ffn(u, mask, weights, int8=True, skips=skips)


def as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return `tensors` in the dtype of autocast, if it is on; neither the compiler nor a kernel sees autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _ffn(backend: Backend, u: torch.Tensor, mask: torch.Tensor, active: int, weights: FFNWeights) -> torch.Tensor:
    """Run the FFN directly or by its operator.

    The operator is called for the reference too. It counts the FLOPs of the chosen experts alone, and in a compiled
    graph it may run in C++. Gradients of the reference are those of PyTorch.
    """
    if backend.name == "reference" and (not backend.recorded or wants_gradient(u, mask, *weights)):
        return reference.expert_ffn(u, mask, *weights)
    if backend.name == "triton" or torch.compiler.is_compiling():
        u, *converted = as_autocast(u, *weights)
        weights = FFNWeights(*converted)
    elif backend.name == "cpu":
        (u,) = as_autocast(u)  # the kernel converts weights when it packs them
    if backend.recorded:
        return torch.ops.actvar_kernels.expert_ffn(u, mask, active, *weights)
    return run_ffn(backend, u, mask, weights)


def run_ffn(backend: Backend, u: torch.Tensor, mask: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    """Run the FFN on a backend."""
    if backend.name == "reference":
        return reference.expert_ffn(u, mask, *weights)
    if backend.name == "cpu" and brgemm.has_tiles(u.dtype):
        return cpu_brgemm.expert_ffn(u, mask, weights, int8=False, skips=False)
    if backend.name == "cpu":
        return cpu_kernel.expert_ffn(u, mask, *weights)
    from actvar_kernels.expert_ffn import triton_kernel

    return triton_kernel.expert_ffn(u, mask, weights)


def _scatter_on_triton(out, index, rows, u, mask, weights, gamma, schedule) -> None:
    """Run `expert_ffn_scatter` into `out` on Triton."""
    from actvar_kernels.expert_ffn import triton_kernel

    triton_kernel.expert_ffn_scatter(out, index, rows, u, mask, weights, gamma, schedule)


@torch.library.custom_op("actvar_kernels::expert_ffn", mutates_args=())
def _expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    weights = FFNWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return run_ffn(_choose("expert_ffn", u, mask, weights), u, mask, weights)


@_expert_ffn.register_fake
def _(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return u.new_empty(u.shape, dtype=cpu.computed_dtype(u))


register_reference_gradient(_expert_ffn, lambda u, mask, active, *weights: reference.expert_ffn(u, mask, *weights))


@torch.library.custom_op("actvar_kernels::expert_ffn_scatter", mutates_args=("out",))
def _expert_ffn_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gamma: torch.Tensor,
    schedule: str,
) -> None:
    """Run `expert_ffn_scatter` into `out`; with `update` and `gate` the rows are x, and these three a `Residual`."""
    weights = FFNWeights(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    source = rows if update is None or gate is None else Residual(rows, update, gate)
    backend = _choose("expert_ffn_scatter", u, mask, weights, *_expect_rows(out, index, source, u, gamma))
    if backend.name == "triton":
        _scatter_on_triton(out, index, source, u, mask, weights, gamma, schedule)
        return
    rows = source.rows(index) if isinstance(source, Residual) else source
    out.copy_(scatter_checked(out, index, rows, run_ffn(backend, u, mask, weights), gamma))


@_expert_ffn_scatter.register_fake
def _(*_):
    return None


def expert_ffn_flops(u_shape, mask_shape, active, fc1_shape, *_shapes, **_kwargs) -> int:
    """Return the FLOPs of one `expert_ffn` call, 2 a multiply-add: only rows and columns of chosen experts count."""
    tokens = 1
    for size in u_shape[:-1]:
        tokens *= size
    D, C = fc1_shape
    return 2 * 2 * tokens * C * (D // mask_shape[-1]) * active


def expert_ffn_scatter_flops(_out_shape, _index_shape, _rows_shape, _update_shape, _gate_shape, *ffn, **_kwargs) -> int:
    """Return the FLOPs of one `expert_ffn_scatter` operator: those of its `expert_ffn`."""
    return expert_ffn_flops(*ffn)


register_flop_formula(torch.ops.actvar_kernels.expert_ffn)(expert_ffn_flops)
register_flop_formula(torch.ops.actvar_kernels.expert_ffn_scatter)(expert_ffn_scatter_flops)
