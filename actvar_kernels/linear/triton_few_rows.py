"""Multiply few rows: a norm ahead of the product, or a residual behind it, in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.constants import NORM_EPS
from actvar_kernels.linear.tiles import linear_residual_tiles, norm_linear_tiles, normed_block
from actvar_kernels.triton_backend import tiles
from actvar_kernels.triton_backend.early_launch import begin, early_launch, fetch_ahead
from actvar_kernels.triton_backend.products import gelu
from actvar_kernels.triton_backend.rows import channels_last

_EPS = tl.constexpr(NORM_EPS)


def norm_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    with_gelu: bool,
) -> torch.Tensor:
    """Return what `few_rows.norm_linear_reference` does, with sums in float32.

    Args:
        x: `[R, L, C]`, float32, float16 or bfloat16.
        scale, shift: `[R, 1, C]`, float32, float16 or bfloat16.
        weight, bias: `[D, C]` and `[D]`, in x's dtype.
        with_gelu: whether GELU follows.
    """
    (R, L, C), D = x.shape, weight.shape[0]
    x, scale, shift = channels_last(x, scale, shift)
    out = x.new_empty(R, L, D)
    tile = norm_linear_tiles(tiles.architecture(x), tiles.is_amd(x), x.dtype, R * L, C, D, tiles.multiprocessors(x))
    _norm_linear[(triton.cdiv(D, tile.columns), triton.cdiv(R * L, tile.rows))](
        x,
        scale,
        shift,
        weight.contiguous(),
        bias.contiguous(),
        out,
        x.stride()[:2],
        scale.stride(0),
        shift.stride(0),
        L,
        R * L,
        C=C,
        D=D,
        GELU=with_gelu,
        COLUMNS=tile.columns,
        BLOCK_T=tile.rows,
        BLOCK_D=tile.step,
        BLOCK_C=normed_block(C),
        PARTS=tile.parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **tiles.most_registers(tile.registers),
        **early_launch(x),
    )
    return out


def linear_residual(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """Return what `few_rows.linear_residual_reference` does, with sums in float32 and one rounding of the last.

    Args:
        h: `[R, L, D]`, float32, float16 or bfloat16.
        weight, bias: `[C, D]` and `[C]`, in h's dtype.
        x: `[R, L, C]`, in h's dtype.
        gamma: `[R, 1, C]`, float32, float16 or bfloat16.
    """
    (R, L, C), D = x.shape, weight.shape[1]
    h, x, gamma = channels_last(h, x, gamma)
    out = x.new_empty(R, L, C)
    tile = linear_residual_tiles(tiles.architecture(x), x.dtype, R * L, C, tiles.multiprocessors(x))
    _linear_residual[(triton.cdiv(C, tile.columns), triton.cdiv(R * L, tile.rows))](
        h,
        weight.contiguous(),
        bias.contiguous(),
        x,
        gamma,
        out,
        h.stride()[:2],
        x.stride()[:2],
        gamma.stride(0),
        L,
        R * L,
        C=C,
        D=D,
        BLOCK_T=tile.rows,
        BLOCK_C=tile.columns,
        BLOCK_D=tile.step,
        PARTS=tile.parts,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early_launch(x),
    )
    return out


@triton.jit(do_not_specialize=["length", "T"])
def _norm_linear(
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_strides,
    scale_stride,
    shift_stride,
    length,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise a tile of rows, and multiply it with `COLUMNS` columns of the weight, `BLOCK_D` at a time."""
    fetch_ahead(weight_ptr, tl.program_id(0) * COLUMNS, D - 1, COLUMNS, C, PDL)
    begin(PDL)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence, token = (tl.minimum(row, T - 1) // length).to(tl.int64), (tl.minimum(row, T - 1) % length).to(tl.int64)
    channel = _parts(PARTS, BLOCK_C // PARTS)
    inside = channel < C
    rows = x_ptr + (sequence * x_strides[0] + token * x_strides[1])[None, :, None]
    x = tl.load(rows + channel, mask=inside, other=0.0).to(tl.float32)  # [PARTS, BLOCK_T, BLOCK_C / PARTS]
    mean = tl.sum(tl.sum(x, axis=2), axis=0) / C
    deviation = tl.where(inside, x - mean[None, :, None], 0.0)
    variance = tl.sum(tl.sum(deviation * deviation, axis=2), axis=0) / C
    scale = tl.load(scale_ptr + (sequence * scale_stride)[None, :, None] + channel, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + (sequence * shift_stride)[None, :, None] + channel, mask=inside, other=0.0)
    normalized = deviation * tl.rsqrt(variance + _EPS)[None, :, None]
    u = (normalized * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)).to(x_ptr.dtype.element_ty)

    for step in range(0, COLUMNS, BLOCK_D):
        column = tl.program_id(0) * COLUMNS + step + tl.arange(0, BLOCK_D)
        columns = weight_ptr + (tl.minimum(column, D - 1).to(tl.int64) * C)[None, :, None]
        weight = tl.load(columns + channel, mask=inside, other=0.0)  # [PARTS, BLOCK_D, BLOCK_C / PARTS]
        y = tl.sum(tl.dot(u, tl.permute(weight, (0, 2, 1)), input_precision="ieee"), axis=0)
        y += tl.load(bias_ptr + tl.minimum(column, D - 1)).to(tl.float32)[None, :]
        if GELU:
            y = gelu(y)
        place = out_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(place, y.to(out_ptr.dtype.element_ty), mask=(row < T)[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["length", "T"])
def _linear_residual(
    h_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    gamma_ptr,
    out_ptr,
    h_strides,
    x_strides,
    gamma_stride,
    length,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply a tile of rows with some columns of the weight, and add the product, times the gate, to rows of x."""
    fetch_ahead(weight_ptr, tl.program_id(0) * BLOCK_C, C - 1, BLOCK_C, D, PDL)
    begin(PDL)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence, token = (tl.minimum(row, T - 1) // length).to(tl.int64), (tl.minimum(row, T - 1) % length).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden = _parts(PARTS, BLOCK_D // PARTS)
    rows = h_ptr + (sequence * h_strides[0] + token * h_strides[1])[None, :, None] + hidden
    columns = weight_ptr + (tl.minimum(column, C - 1).to(tl.int64) * D)[None, :, None] + hidden
    sums = tl.zeros((PARTS, BLOCK_T, BLOCK_C), tl.float32)
    for k in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            h, weight = tl.load(rows + k), tl.load(columns + k)
        else:
            inside = k + hidden < D
            h, weight = tl.load(rows + k, mask=inside, other=0.0), tl.load(columns + k, mask=inside, other=0.0)
        weight = tl.permute(weight, (0, 2, 1))
        if h.dtype == tl.float32:
            sums += tl.dot(h, weight, input_precision="ieee")  # the error grows with steps, not with terms
        else:
            sums = tl.dot(h, weight, sums)
    y = tl.sum(sums, axis=0) + tl.load(bias_ptr + tl.minimum(column, C - 1)).to(tl.float32)[None, :]
    y = y.to(h_ptr.dtype.element_ty).to(tl.float32)  # as a product by itself is stored
    written = (row < T)[:, None] & (column < C)[None, :]
    places = (sequence * x_strides[0] + token * x_strides[1])[:, None] + column[None, :]
    x = tl.load(x_ptr + places, mask=written, other=0.0).to(tl.float32)
    gate = gamma_ptr + (sequence * gamma_stride)[:, None] + column[None, :]
    out = x + tl.load(gate, mask=written, other=0.0).to(tl.float32) * y
    place = out_ptr + row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=written)


@triton.jit
def _parts(PARTS: tl.constexpr, DEPTH: tl.constexpr):
    """Return the channels of equal parts, `[PARTS, 1, DEPTH]`; each warp sums the products of one."""
    return tl.arange(0, PARTS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
