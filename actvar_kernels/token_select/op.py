"""Choose which tokens a block updates, and make their rows ready for attention."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, get_backend, in_kernel_dtypes
from actvar_kernels.checks import as_number, expect_count, expect_one_device, expect_shape
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.token_select import reference
from actvar_kernels.triton_backend.row_form import ByteRows, RowForm, fake_rows, formed, scales_of, values_of

MAX_TOKENS = 8192
"""Tokens of a sequence that the Triton kernel ranks."""
_NORM_LIMITS = f"float32, float16 and bfloat16, up to {MOST_SEQUENCES} sequences"
_SELECTION_LIMITS = f"{_NORM_LIMITS} of up to {MAX_TOKENS} tokens"


class Selection(NamedTuple):
    """Hold the tokens that a block updates.

    Attributes:
        index: `[R, K]` int64, ascending.
        modulated: `[R, K, C]`, the kept rows of x after LayerNorm and modulation, in the form asked for.
        scores: `[R, L]` float32; None where another block has chosen.
        rest: `[R, L, C]` in x's dtype: rows of x that were not kept, the others undefined. The scattering operations
            fill and return it.
    """

    index: torch.Tensor
    modulated: torch.Tensor | ByteRows
    scores: torch.Tensor | None
    rest: torch.Tensor


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    *,
    share_guidance: bool = False,
    in_place: bool = False,
    form: RowForm | None = None,
) -> Selection:
    """Keep the `keep` rows with the highest `LN(x) @ weight + bias`; modulate them by `LN(x) * (1 + scale) + shift`.

    LN has no affine part and eps 1e-6. Scores are in float32 and outside autocast. Ties go to the lower index. Triton
    takes two launches; a third one ranks L above 1024, up to 8192.

    Args:
        x: `[R, L, C]`, float32, float16 or bfloat16.
        weight, bias: the selector, `[1, C]` and `[1]`, floating-point.
        scale, shift: `[R, 1, C]`, floating-point, AdaLN of the attention branch.
        keep: rows to keep per sequence, 1 ... L.
        share_guidance: whether the first half of the R rows (conditional) decides for the second half as well.
        in_place: whether `base` may be x itself, which the operation that fills it then overwrites. It never is where
            gradients are on.
        form: of the modulated rows; None for x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, `keep` out of range, an odd R with `share_guidance`.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None))
    R, L, C = x.shape
    expect_shape("weight", weight, (1, C))
    expect_shape("bias", bias, (1,))
    expect_shape("scale", scale, (R, 1, C))
    expect_shape("shift", shift, (R, 1, C))
    keep = expect_count("keep", keep, L)
    if share_guidance and R % 2:
        raise ValueError(f"share_guidance: expected conditional and unconditional rows in equal number, got {R} rows")
    in_place = in_place and not torch.is_grad_enabled() and x.stride(2) == 1
    tensors = (x, weight, bias, scale, shift)
    expect_one_device(*tensors)
    backend = _choose_selection(*tensors)
    if form is not None:
        if not form.is_fused(backend, *tensors):
            plain = select_tokens(*tensors, keep, share_guidance=share_guidance, in_place=in_place)
            return plain._replace(modulated=values_of(plain.modulated).to(form.dtype))
        run = torch.ops.actvar_kernels.select_tokens_as if backend.recorded else _select_as
        values, scales, scores, base, index = run(*tensors, keep, share_guidance, in_place, *form)
        return Selection(index, formed(values, scales, form), scores, x if in_place else base)
    if backend.calls_operator:
        operator = torch.ops.actvar_kernels.select_tokens
        modulated, scores, base, index = operator(*tensors, keep, share_guidance, in_place)
    else:
        index, modulated, scores, base = _select(backend, *tensors, keep, share_guidance, in_place)
    return Selection(index, modulated, scores, x if in_place else base)


@overload
def normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, guidance: float | None = None, *, form: None = None
) -> torch.Tensor: ...


@overload
def normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, form: RowForm | None
) -> torch.Tensor | ByteRows: ...


def normalize_modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    guidance: float | None = None,
    *,
    form: RowForm | None = None,
) -> torch.Tensor | ByteRows:
    """Return `y = LN(x) * (1 + scale) + shift`, computed in float32, or float64 for a float64 x.

    Args:
        x: `[R, K, C]`, floating-point.
        scale, shift: `[R, 1, C]`, floating-point.
        guidance: strength t of classifier-free guidance, or None. With it `(1 + t) * y[:R // 2] - t * y[R // 2:]` is
            returned: a linear layer that follows has half the rows.
        form: of the result, without guidance; None for x's dtype. Triton takes one launch in each.

    Returns:
        `[R, K, C]` in the form, or in x's dtype with guidance `[R // 2, K, C]`.

    Raises:
        ValueError: shapes or devices that do not fit, or a form with guidance.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None))
    expect_shape("scale", scale, (x.shape[0], 1, x.shape[2]))
    expect_shape("shift", shift, (x.shape[0], 1, x.shape[2]))
    guidance = None if guidance is None else as_number("guidance", guidance)
    if guidance is not None and x.shape[0] % 2:
        raise ValueError(f"x: expected conditional and unconditional rows, got an odd number of rows, {x.shape[0]}")
    tensors = (x, scale, shift)
    expect_one_device(*tensors)
    backend = _choose_norm(*tensors, guided=guidance is not None)
    if form is not None:
        if guidance is not None:
            raise ValueError(f"form: expected None with guidance, got {form}")
        if not form.is_fused(backend, *tensors):
            return normalize_modulate(*tensors).to(form.dtype)
        run = torch.ops.actvar_kernels.normalize_modulate_as if backend.recorded else _normalize_as
        rows, scales = run(*tensors, *form)
        return formed(rows, scales, form)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.normalize_modulate(*tensors, guidance)
    return _normalize(backend, *tensors, guidance)


def _choose_selection(x: torch.Tensor, *others: torch.Tensor) -> Backend:
    """Return the backend of a call of `select_tokens` with these tensors."""

    def takes_triton() -> bool:
        return x.shape[1] <= MAX_TOKENS and x.shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(x, *others)

    return choose(
        "select_tokens",
        x,
        *others,
        takes_triton=takes_triton,
        limits=_SELECTION_LIMITS,
        why_not_in_cpp=lambda: cpu.why_not(x, *others),
    )


def _select(backend, x, weight, bias, scale, shift, keep, share_guidance, in_place) -> tuple[torch.Tensor, ...]:
    """Return index, modulated rows, scores and base on a backend."""
    tensors = (x, weight, bias, scale, shift)
    if backend.name == "cpu":
        return *row_ops.select_tokens(*tensors, keep, share_guidance), x if in_place else x.clone()
    if backend.name == "reference":
        *selected, base = reference.select_tokens(*tensors, keep, share_guidance)
        # another operation may run in a kernel, which must not write to x
        return *selected, base if in_place or get_backend() == "reference" else base.clone()
    from actvar_kernels.token_select import triton_kernel

    return triton_kernel.select_tokens(x, weight, bias, scale, shift, keep, share_guidance, in_place)


@torch.library.custom_op("actvar_kernels::select_tokens", mutates_args=())
def _select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
    in_place: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run `select_tokens`; with `in_place` the base is empty, since an operator must not return its argument."""
    backend = _choose_selection(x, weight, bias, scale, shift)
    index, modulated, scores, base = _select(backend, x, weight, bias, scale, shift, keep, share_guidance, in_place)
    if in_place:
        base = x.new_empty(0)
    return modulated, scores, base.clone() if base is x else base, index


@_select_tokens.register_fake
def _(x, weight, bias, scale, shift, keep, share_guidance, in_place):
    R, L, C = x.shape
    index, scores = x.new_empty(R, keep, dtype=torch.int64), x.new_empty(R, L, dtype=torch.float32)
    return x.new_empty(R, keep, C), scores, x.new_empty(0) if in_place else x.new_empty(R, L, C), index


def _at_index(x, weight, bias, scale, shift, keep, share_guidance, in_place, index) -> tuple[torch.Tensor, ...]:
    """Return what the operator does, by the reference, for a choice that was made."""
    return *reference.at_index(x, weight, bias, scale, shift, index), index


register_reference_gradient(_select_tokens, _at_index, chosen=(3,))


def select_tokens_flops(x_shape, *_shapes, **_kwargs) -> int:
    """Return the FLOPs of the selector's product in one `select_tokens` operator."""
    R, L, C = x_shape
    return 2 * R * L * C


register_flop_formula(torch.ops.actvar_kernels.select_tokens)(select_tokens_flops)


def _choose_norm(*tensors: torch.Tensor, guided: bool) -> Backend:
    """Return the backend of a call of `normalize_modulate` with these tensors."""

    def takes_triton() -> bool:
        return tensors[0].shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(*tensors)

    def why_not_in_cpp() -> str | None:
        return "it takes no guidance" if guided else cpu.why_not(*tensors)

    return choose(
        "normalize_modulate", *tensors, takes_triton=takes_triton, limits=_NORM_LIMITS, why_not_in_cpp=why_not_in_cpp
    )


def _normalize(backend, x, scale, shift, guidance) -> torch.Tensor:
    """Run `normalize_modulate` on a backend."""
    if backend.name == "cpu":
        return row_ops.normalize_modulate(x, scale, shift)
    if backend.name == "reference":
        return reference.normalize_modulate(x, scale, shift, guidance)
    from actvar_kernels.token_select import triton_kernel

    return triton_kernel.normalize_modulate(x, scale, shift, guidance)


@torch.library.custom_op("actvar_kernels::normalize_modulate", mutates_args=())
def _normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, guidance: float | None
) -> torch.Tensor:
    backend = _choose_norm(x, scale, shift, guided=guidance is not None)
    return _normalize(backend, x, scale, shift, guidance)


@_normalize_modulate.register_fake
def _(x, scale, shift, guidance):
    R, K, C = x.shape
    return x.new_empty(R if guidance is None else R // 2, K, C)


register_reference_gradient(_normalize_modulate, reference.normalize_modulate)


def _select_as(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
    in_place: bool,
    dtype: torch.dtype,
    quantized: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows of a form, scales, scores, base and index, on Triton; what there is none of is empty."""
    from actvar_kernels.token_select import triton_kernel

    tensors, form = (x, weight, bias, scale, shift), RowForm(dtype, quantized)
    index, rows, scores, base = triton_kernel.select_tokens(*tensors, keep, share_guidance, in_place, form)
    return values_of(rows), scales_of(rows), scores, x.new_empty(0) if in_place else base, index


def _normalize_as(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype, quantized: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of a form and their scales, on Triton; scales are empty where there are none."""
    from actvar_kernels.token_select import triton_kernel

    rows = triton_kernel.normalize_modulate(x, scale, shift, None, RowForm(dtype, quantized))
    return values_of(rows), scales_of(rows)


_select_operator = torch.library.custom_op("actvar_kernels::select_tokens_as", _select_as, mutates_args=())
_normalize_operator = torch.library.custom_op("actvar_kernels::normalize_modulate_as", _normalize_as, mutates_args=())


@_select_operator.register_fake
def _(x, weight, bias, scale, shift, keep, share_guidance, in_place, dtype, quantized):
    R, L, C = x.shape
    rows, scales = fake_rows(x, RowForm(dtype, quantized), R, keep, C)
    index, scores = x.new_empty(R, keep, dtype=torch.int64), x.new_empty(R, L, dtype=torch.float32)
    return rows, scales, scores, x.new_empty(0) if in_place else x.new_empty(R, L, C), index


@_normalize_operator.register_fake
def _(x, scale, shift, dtype, quantized):
    return fake_rows(x, RowForm(dtype, quantized), *x.shape)


register_flop_formula(torch.ops.actvar_kernels.select_tokens_as)(select_tokens_flops)
