"""Run residual, LayerNorm, modulation and the choice of experts in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from actvar_kernels.residual_norm.reference import AdaLN
from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.row_form import RowForm, formed
from actvar_kernels.triton_backend.rows import (
    TRITON_DTYPES,
    channels_last,
    load_rows,
    load_vector,
    normalized,
    route,
    store_as,
)
from actvar_kernels.triton_backend.tiles import RouteTiles, architecture, route_tiles, row_tiles


def add_normalize(
    x: torch.Tensor, index: torch.Tensor | None, update: torch.Tensor, adaln: AdaLN, form: RowForm | None = None
) -> tuple[torch.Tensor, Any]:
    """Return what `reference.add_normalize` does, with one rounding of the sum.

    Args:
        x, update: `[R, L, C]` and `[R, K, C]`, float32, float16 or bfloat16.
        index: `[R, K]` int64, or None.
        adaln: three tensors `[R, 1, C]`, float32, float16 or bfloat16.
        form: of the normalised rows; None for those of the reference.
    """
    out, u, _, _ = _launch(x, index, update, adaln, None, None, 0, fuse_residual=False, form=form)
    return out, u


def add_normalize_route(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    adaln: AdaLN,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
    fuse_residual: bool,
    form: RowForm | None = None,
) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Return what `reference.add_normalize_route` does, with one rounding of the sum.

    Args:
        x, index, update, adaln, form: as in `add_normalize`. Experts are chosen by the rows of the reference.
        weight, bias: `[N, C]` and `[N]`, N <= 32, float32, float16 or bfloat16.
        active: experts per token, 1 ... N.
        fuse_residual: whether to leave out the sum, which is None then.
    """
    return _launch(x, index, update, adaln, weight.contiguous(), bias, active, fuse_residual, form)


def _launch(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    adaln: AdaLN,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    active: int,
    fuse_residual: bool,
    form: RowForm | None,
) -> tuple[Any, Any, Any, Any]:
    """Launch the kernel; without a weight there are no experts."""
    R, K, C = update.shape
    x, update, gamma, scale, shift = channels_last(x, update, *adaln)
    form = RowForm(x.dtype) if form is None else form
    out, (u, scales) = None if fuse_residual else x.new_empty(R, K, C), form.empty(x, R, K, C)
    mask = logits = None
    experts = 0 if weight is None else weight.shape[0]
    if experts:
        mask = x.new_empty(R, K, experts, dtype=torch.bool)
        logits = x.new_empty(R, K, experts, dtype=torch.float32)
    tiles = RouteTiles(*row_tiles(R * K, C))
    if experts:
        tiles = route_tiles(architecture(x), R * K, C, x.dtype)
    _add_normalize_route[(triton.cdiv(K, tiles.rows), R)](
        x,
        None if index is None else index.contiguous(),
        update,
        gamma,
        scale,
        shift,
        weight,
        bias,
        out,
        u,
        scales,
        mask,
        logits,
        x.stride(),
        update.stride(),
        gamma.stride(),
        scale.stride(),
        shift.stride(),
        K,
        active,
        EXPERTS=experts,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        SPLITS=tiles.splits,
        DTYPE=TRITON_DTYPES[form.dtype],
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        **early_launch(x),
    )
    return out, formed(u, scales, form), mask, logits


@triton.jit(do_not_specialize=["length", "active"])
def _add_normalize_route(
    x_ptr,
    index_ptr,
    update_ptr,
    gamma_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    u_ptr,
    u_scales_ptr,
    mask_ptr,
    logits_ptr,
    x_strides,
    update_strides,
    gamma_strides,
    scale_strides,
    shift_strides,
    length,
    active,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add, normalise and route `ROWS` rows of a sequence, those of x by their index if there is one.

    Without experts there is no routing. Without `out_ptr` the sum is not kept. With `u_scales_ptr` the rows are bytes.
    """
    begin(PDL)
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    present = row < length
    if index_ptr is None:
        source = row
    else:
        source = tl.load(index_ptr + sequence.to(tl.int64) * length + row, mask=present, other=0)
    x = load_rows(x_ptr, x_strides, sequence, source, present, channel, inside).to(tl.float32)
    update = load_rows(update_ptr, update_strides, sequence, row, present, channel, inside).to(tl.float32)
    gamma = load_vector(gamma_ptr, gamma_strides, sequence, channel, inside)
    scale = load_vector(scale_ptr, scale_strides, sequence, channel, inside)
    shift = load_vector(shift_ptr, shift_strides, sequence, channel, inside)

    # later operations read the sum and its LayerNorm as they are stored
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    flat = sequence.to(tl.int64) * length + row
    target = flat[:, None] * C + channel[None, :]
    written = present[:, None] & inside[None, :]
    out = (x + gamma[None, :] * update).to(dtype)
    if out_ptr is not None:
        tl.store(out_ptr + target, out, mask=written)
    u = normalized(out.to(tl.float32), inside, C) * (1.0 + scale)[None, :] + shift[None, :]
    u = u.to(dtype)
    store_as(u_ptr, u_scales_ptr, u, target, flat, present, inside, DTYPE)
    if EXPERTS:
        route(u, weight_ptr, bias_ptr, mask_ptr, logits_ptr, flat, present, active, EXPERTS, C, BLOCK_C, SPLITS)
