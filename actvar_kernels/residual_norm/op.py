"""Between attention and FFN: residual, LayerNorm, modulation, and the router's choice of experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_count, expect_index, expect_one_device, expect_shape
from actvar_kernels.constants import MAX_EXPERTS
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.residual_norm import reference
from actvar_kernels.residual_norm.reference import Residual

_LIMITS = f"float32, float16 and bfloat16, up to {MAX_EXPERTS} experts and {MOST_SEQUENCES} sequences"


class Routed(NamedTuple):
    """`rows` `[R, K, C]` after the residual, or the `Residual` that gives them; `u` `[R, K, C]` the FFN's input; `mask`
    `[R, K, N]` bool, the experts that run; `logits` `[R, K, N]` float32."""

    rows: torch.Tensor | Residual
    u: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x[r, index[r, j]] + gamma[r] * update[r, j]` in x's dtype, and the same after `LN(.) * (1 + scale) + shift`.

    LN is that of `normalize_modulate`, on the sum as it is stored.

    Args:
        x: `[R, L, C]`.
        index: `[R, K]` int64, the rows that the update is of; None: all, K = L.
        update: `[R, K, C]`, of the attention branch; in x's dtype or, under autocast, lower.
        gamma, scale, shift: `[R, 1, C]`: the gate of the branch that ends, scale and shift of the one that begins.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_rows(x, index, update, gamma, scale, shift)
    tensors = (x, index, update, gamma, scale, shift)
    backend = _choose("add_normalize", *tensors)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.add_normalize(*tensors)
    return _add(backend, *tensors)


def add_normalize_route(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
    deferred: bool = False,
) -> Routed:
    """`add_normalize`, then `route_experts` on the result; one launch on Triton, up to 32 experts.

    Args:
        x, index, update, gamma, scale, shift: as in `add_normalize`.
        weight, bias, active: as in `route_experts`.
        deferred: `rows` is a `Residual` of the arguments, which `expert_ffn_scatter` takes for them: on Triton it sums
            them again, which costs less than to write and read them.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit, or `active` out of range.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_rows(x, index, update, gamma, scale, shift)
    expect_shape("weight", weight, (None, x.shape[2]))
    expect_shape("bias", bias, (weight.shape[0],))
    active = expect_count("active", active, weight.shape[0])
    expect_one_device(x, weight, bias)
    tensors = (x, index, update, gamma, scale, shift, weight, bias)
    backend = _choose("add_normalize_route", *tensors, experts=weight.shape[0])
    if backend.calls_operator:
        rows, *others = torch.ops.actvar_kernels.add_normalize_route(*tensors, active, deferred)
    else:
        rows, *others = _add_and_route(backend, *tensors, active, deferred)
    return Routed(Residual(x, update, gamma) if deferred else rows, *others)


def _expect_rows(x, index, update, gamma, scale, shift) -> None:
    expect_shape("x", x, (None, None, None))
    R, L, C = x.shape
    if index is not None:
        expect_index(index, (R, None))
    expect_shape("update", update, (R, L if index is None else index.shape[1], C))
    for name, tensor in (("gamma", gamma), ("scale", scale), ("shift", shift)):
        expect_shape(name, tensor, (R, 1, C))
    expect_one_device(x, index, update, gamma, scale, shift)


def _choose(operation: str, x: torch.Tensor, _index, *others: torch.Tensor, experts: int = 0) -> Backend:
    """Return the backend of a call with these arguments."""

    def takes_triton() -> bool:
        return experts <= MAX_EXPERTS and x.shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(x, *others)

    return choose(
        operation,
        x,
        *others,
        takes_triton=takes_triton,
        limits=_LIMITS,
        why_not_in_cpp=lambda: cpu.why_not(x, *others),
    )


def _add(backend, x, index, update, gamma, scale, shift) -> tuple[torch.Tensor, torch.Tensor]:
    if backend.name == "cpu":
        return row_ops.add_normalize(x, index, update, gamma, scale, shift)
    if backend.name == "reference":
        return reference.add_normalize(x, index, update, gamma, scale, shift)
    from actvar_kernels.residual_norm import triton_kernel

    return triton_kernel.add_normalize(x, index, update, gamma, scale, shift)


def _add_and_route(
    backend, x, index, update, gamma, scale, shift, weight, bias, active, deferred
) -> tuple[torch.Tensor, ...]:
    """The first result is None where it is deferred and the backend need not make it."""
    tensors = (x, index, update, gamma, scale, shift, weight, bias)
    if backend.name == "cpu":
        return row_ops.add_normalize_route(*tensors, active)
    if backend.name == "reference":
        return reference.add_normalize_route(*tensors, active)
    from actvar_kernels.residual_norm import triton_kernel

    return triton_kernel.add_normalize_route(*tensors, active, deferred)


@torch.library.custom_op("actvar_kernels::add_normalize", mutates_args=())
def _add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = _choose("add_normalize", x, index, update, gamma, scale, shift)
    return _add(backend, x, index, update, gamma, scale, shift)


@_add_normalize.register_fake
def _(x, index, update, gamma, scale, shift):
    return x.new_empty(update.shape), x.new_empty(update.shape)


register_reference_gradient(_add_normalize, reference.add_normalize)


@torch.library.custom_op("actvar_kernels::add_normalize_route", mutates_args=())
def _add_normalize_route(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
    deferred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first result is empty if it is deferred."""
    tensors = (x, index, update, gamma, scale, shift, weight, bias)
    backend = _choose("add_normalize_route", *tensors, experts=weight.shape[0])
    rows, *others = _add_and_route(backend, *tensors, active, deferred)
    return x.new_empty(0) if deferred else rows, *others


@_add_normalize_route.register_fake
def _(x, index, update, gamma, scale, shift, weight, bias, active, deferred):
    mask = x.new_empty(*update.shape[:-1], weight.shape[0], dtype=torch.bool)
    logits = torch.empty_like(mask, dtype=torch.float32)
    return x.new_empty(0 if deferred else update.shape), x.new_empty(update.shape), mask, logits


def _differentiable(x, index, update, gamma, scale, shift, weight, bias, active, deferred) -> tuple[torch.Tensor, ...]:
    rows, *others = reference.add_normalize_route(x, index, update, gamma, scale, shift, weight, bias, active)
    return x.new_empty(0) if deferred else rows, *others


register_reference_gradient(_add_normalize_route, _differentiable)


def add_normalize_route_flops(_x, _index, update_shape, _gamma, _scale, _shift, weight_shape, *_args, **_kwargs) -> int:
    """FLOPs of the router's product in one `add_normalize_route` operator."""
    R, K, C = update_shape
    return 2 * R * K * C * weight_shape[0]


register_flop_formula(torch.ops.actvar_kernels.add_normalize_route)(add_normalize_route_flops)
