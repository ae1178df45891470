"""Run what lies between attention and FFN: residual, LayerNorm, modulation, and the choice of experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_count, expect_index, expect_one_device, expect_shape
from actvar_kernels.constants import MAX_EXPERTS
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.residual_norm import reference
from actvar_kernels.residual_norm.reference import AdaLN, Residual
from actvar_kernels.triton_backend.row_form import ByteRows, RowForm, fake_rows, formed, scales_of, values_of

_LIMITS = f"float32, float16 and bfloat16, up to {MAX_EXPERTS} experts and {MOST_SEQUENCES} sequences"


class Routed(NamedTuple):
    """Hold the rows of a block between attention and FFN.

    Attributes:
        rows: `[R, K, C]` after the residual, or the `Residual` that gives them.
        u: `[R, K, C]`, the input of the FFN, in the form asked for.
        mask: `[R, K, N]` bool, the experts that run.
        logits: `[R, K, N]` float32.
    """

    rows: torch.Tensor | Residual
    u: torch.Tensor | ByteRows
    mask: torch.Tensor
    logits: torch.Tensor


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    form: RowForm | None = None,
) -> tuple[torch.Tensor, Any]:
    """Return `x[r, index[r, j]] + gamma[r] * update[r, j]`, and the same after `LN(.) * (1 + scale) + shift`.

    LN is that of `normalize_modulate`, on the sum as it is stored.

    Args:
        x: `[R, L, C]`, floating-point.
        index: `[R, K]` int64, the rows that are updated; None: all, K = L.
        update: `[R, K, C]`, what the attention branch adds; in x's dtype or, under autocast, a lower one.
        gamma: `[R, 1, C]`, the gate of the branch that ends.
        scale, shift: `[R, 1, C]`, of the branch that begins.
        form: of the normalised rows; None for x's dtype.

    Returns:
        `[R, K, C]` in x's dtype, and `[R, K, C]` in the form.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    adaln = AdaLN(gamma, scale, shift)
    _expect_rows(x, index, update, adaln)
    backend = _choose("add_normalize", x, update, adaln)
    if form is not None:
        if not form.is_fused(backend, x, update, *adaln):
            rows, u = add_normalize(x, index, update, *adaln)
            return rows, u.to(form.dtype)
        run = torch.ops.actvar_kernels.add_normalize_as if backend.recorded else _add_as
        rows, u, scales = run(x, index, update, *adaln, *form)
        return rows, formed(u, scales, form)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.add_normalize(x, index, update, *adaln)
    return _add(backend, x, index, update, adaln)


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
    form: RowForm | None = None,
) -> Routed:
    """Run `add_normalize`, then `route_experts` on the result; on Triton in one launch, for up to 32 experts.

    Args:
        x, index, update, gamma, scale, shift: as in `add_normalize`.
        weight, bias: the router, `[N, C]` and `[N]`, floating-point.
        active: experts per token, 1 ... N.
        deferred: whether `rows` is a `Residual` of the arguments, which `expert_ffn_scatter` takes instead. On Triton
            the sum is made again there, which costs less than to write and read it.
        form: of `u`; None for x's dtype. The router reads it in x's dtype.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit, or `active` out of range.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    adaln = AdaLN(gamma, scale, shift)
    _expect_rows(x, index, update, adaln)
    expect_shape("weight", weight, (None, x.shape[2]))
    expect_shape("bias", bias, (weight.shape[0],))
    active = expect_count("active", active, weight.shape[0])
    expect_one_device(x, weight, bias)
    backend = _choose("add_normalize_route", x, update, adaln, weight, bias)
    if form is not None:
        if not form.is_fused(backend, x, update, *adaln, weight, bias):
            routed = add_normalize_route(x, index, update, *adaln, weight, bias, active, deferred)
            return routed._replace(u=values_of(routed.u).to(form.dtype))
        run = torch.ops.actvar_kernels.add_normalize_route_as if backend.recorded else _add_and_route_as
        rows, u, scales, mask, logits = run(x, index, update, *adaln, weight, bias, active, deferred, *form)
        return Routed(Residual(x, update, gamma) if deferred else rows, formed(u, scales, form), mask, logits)
    if backend.calls_operator:
        operator = torch.ops.actvar_kernels.add_normalize_route
        rows, *others = operator(x, index, update, *adaln, weight, bias, active, deferred)
    else:
        rows, *others = _add_and_route(backend, x, index, update, adaln, weight, bias, active, deferred)
    return Routed(Residual(x, update, gamma) if deferred else rows, *others)


def _expect_rows(x: torch.Tensor, index: torch.Tensor | None, update: torch.Tensor, adaln: AdaLN) -> None:
    """Raise unless the tensors fit each other."""
    expect_shape("x", x, (None, None, None))
    R, L, C = x.shape
    if index is not None:
        expect_index(index, (R, None))
    expect_shape("update", update, (R, L if index is None else index.shape[1], C))
    for name, tensor in zip(AdaLN._fields, adaln, strict=True):
        expect_shape(name, tensor, (R, 1, C))
    expect_one_device(x, index, update, *adaln)


def _choose(operation: str, x: torch.Tensor, update: torch.Tensor, adaln: AdaLN, *router: torch.Tensor) -> Backend:
    """Return the backend of a call with these tensors; `router` is its weight and bias, or nothing."""

    def takes_triton() -> bool:
        experts = router[1].shape[0] if len(router) > 0 else 0
        fits = experts <= MAX_EXPERTS and x.shape[0] <= MOST_SEQUENCES
        return fits and in_kernel_dtypes(x, update, *adaln, *router)

    return choose(
        operation,
        x,
        update,
        *adaln,
        *router,
        takes_triton=takes_triton,
        limits=_LIMITS,
        why_not_in_cpp=lambda: cpu.why_not(x, update, *adaln, *router),
    )


def _add(backend: Backend, x, index, update, adaln: AdaLN) -> tuple[torch.Tensor, torch.Tensor]:
    if backend.name == "cpu":
        return row_ops.add_normalize(x, index, update, *adaln)
    if backend.name == "reference":
        return reference.add_normalize(x, index, update, *adaln)
    from actvar_kernels.residual_norm import triton_kernel

    return triton_kernel.add_normalize(x, index, update, adaln)


def _add_and_route(
    backend: Backend, x, index, update, adaln: AdaLN, weight, bias, active, fuse_residual
) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the operation; with `fuse_residual` the first result may be None."""
    if backend.name == "cpu":
        return row_ops.add_normalize_route(x, index, update, *adaln, weight, bias, active)
    if backend.name == "reference":
        return reference.add_normalize_route(x, index, update, *adaln, weight, bias, active)
    from actvar_kernels.residual_norm import triton_kernel

    return triton_kernel.add_normalize_route(x, index, update, adaln, weight, bias, active, fuse_residual)


@torch.library.custom_op("actvar_kernels::add_normalize", mutates_args=())
def _add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    adaln = AdaLN(gamma, scale, shift)
    return _add(_choose("add_normalize", x, update, adaln), x, index, update, adaln)


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
    fuse_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the operation; with `fuse_residual` the first result is empty."""
    adaln = AdaLN(gamma, scale, shift)
    backend = _choose("add_normalize_route", x, update, adaln, weight, bias)
    rows, u, mask, logits = _add_and_route(backend, x, index, update, adaln, weight, bias, active, fuse_residual)
    return x.new_empty(0) if fuse_residual else rows, u, mask, logits


@_add_normalize_route.register_fake
def _(x, index, update, gamma, scale, shift, weight, bias, active, fuse_residual):
    mask = x.new_empty(*update.shape[:-1], weight.shape[0], dtype=torch.bool)
    logits = torch.empty_like(mask, dtype=torch.float32)
    return x.new_empty(0 if fuse_residual else update.shape), x.new_empty(update.shape), mask, logits


def _differentiable(
    x, index, update, gamma, scale, shift, weight, bias, active, fuse_residual
) -> tuple[torch.Tensor, ...]:
    """Return what the operator does, by the reference."""
    rows, *others = reference.add_normalize_route(x, index, update, gamma, scale, shift, weight, bias, active)
    return x.new_empty(0) if fuse_residual else rows, *others


register_reference_gradient(_add_normalize_route, _differentiable)


def add_normalize_route_flops(_x, _index, update_shape, _gamma, _scale, _shift, weight_shape, *_args, **_kwargs) -> int:
    """Return the FLOPs of the router's product in one `add_normalize_route` operator."""
    R, K, C = update_shape
    return 2 * R * K * C * weight_shape[0]


register_flop_formula(torch.ops.actvar_kernels.add_normalize_route)(add_normalize_route_flops)


def _add_as(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype,
    quantized: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum, rows of a form and their scales, on Triton; scales are empty where there are none."""
    from actvar_kernels.residual_norm import triton_kernel

    adaln = AdaLN(gamma, scale, shift)
    rows, u = triton_kernel.add_normalize(x, index, update, adaln, RowForm(dtype, quantized))
    return rows, values_of(u), scales_of(u)


def _add_and_route_as(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
    fuse_residual: bool,
    dtype: torch.dtype,
    quantized: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sum, rows of a form, scales, mask and logits, on Triton; what there is none of is empty."""
    from actvar_kernels.residual_norm import triton_kernel

    arguments = (x, index, update, AdaLN(gamma, scale, shift), weight, bias, active, fuse_residual)
    rows, u, mask, logits = triton_kernel.add_normalize_route(*arguments, RowForm(dtype, quantized))
    return x.new_empty(0) if rows is None else rows, values_of(u), scales_of(u), mask, logits


_add_operator = torch.library.custom_op("actvar_kernels::add_normalize_as", _add_as, mutates_args=())
_route_operator = torch.library.custom_op("actvar_kernels::add_normalize_route_as", _add_and_route_as, mutates_args=())


@_add_operator.register_fake
def _(x, index, update, gamma, scale, shift, dtype, quantized):
    return x.new_empty(update.shape), *fake_rows(x, RowForm(dtype, quantized), *update.shape)


@_route_operator.register_fake
def _(x, index, update, gamma, scale, shift, weight, bias, active, fuse_residual, dtype, quantized):
    mask = x.new_empty(*update.shape[:-1], weight.shape[0], dtype=torch.bool)
    rows = x.new_empty(0 if fuse_residual else update.shape)
    return (
        rows,
        *fake_rows(x, RowForm(dtype, quantized), *update.shape),
        mask,
        torch.empty_like(mask, dtype=torch.float32),
    )


register_flop_formula(torch.ops.actvar_kernels.add_normalize_route_as)(add_normalize_route_flops)
