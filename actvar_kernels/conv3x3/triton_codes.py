"""Enlarge, convolve and add the codes of a scale by Triton, and average the sum."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

_CUBIC = tl.constexpr(-0.75)
"""The parameter of PyTorch's bicubic interpolation."""


def add_codes(
    features: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    following: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return what `codes.reference` does, with sums in float32.

    Args:
        features: `[B, C, P, P]` without gaps, float32, float16 or bfloat16, C up to `codes.MOST_CHANNELS`.
        tokens: `[B, p * p]` int64.
        codebook, weight, bias: `[V, C]`, `[C, C, 3, 3]` and `[C]`, float32, float16 or bfloat16.
        ratio, following, dtype: as in `codes.add_codes`.
    """
    B, C, side, _ = features.shape
    of_scale, block = round(tokens.shape[1] ** 0.5), max(16, triton.next_power_of_2(C))
    enlarged = features.new_empty(B, side, side, C, dtype=torch.float32)
    places = 16 if B * side * side <= 8192 else 64
    grid, sizes = (triton.cdiv(side * side, places), B), dict(SIDE=side, C=C, BLOCK_C=block, PLACES=places)
    _enlarge[grid](tokens.contiguous(), codebook.contiguous(), enlarged, OF_SCALE=of_scale, **sizes)
    _convolve_and_add[grid](enlarged, weight.contiguous(), bias.contiguous(), features, ratio, **sizes)
    out = features.new_empty(B, following, following, C, dtype=dtype)
    if following:
        grid, sizes = (triton.cdiv(following * following, 16), B), sizes | dict(PLACES=16)
        window = min(side, triton.cdiv(side, following) + (side % following != 0))
        _average[grid](features, out, NEXT=following, WINDOW=window, **sizes)
    return out.permute(0, 3, 1, 2)


@triton.jit
def _cubic_weight(t, tap: tl.constexpr):
    """Return the weight of tap -1, 0, 1 or 2 of bicubic interpolation, at `t` in [0, 1) behind tap 0."""
    if tap == 0 or tap == 1:
        x = t if tap == 0 else 1 - t
        return (x * (_CUBIC + 2) - (_CUBIC + 3)) * x * x + 1
    else:
        x = t + 1 if tap == -1 else 2 - t
        return ((x * _CUBIC - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC


@triton.jit
def _source(place, OF_SCALE: tl.constexpr, SIDE: tl.constexpr):
    """Return the code before a place of an axis as an integer, and how far behind it the place is."""
    at = (place.to(tl.float32) + 0.5) * (OF_SCALE / SIDE) - 0.5
    before = tl.floor(at)
    return before.to(tl.int32), at - before


@triton.jit
def _enlarge(
    tokens_ptr,
    codebook_ptr,
    out_ptr,
    OF_SCALE: tl.constexpr,
    SIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Look up the codes around some places of an image, and write their bicubic interpolation `[B, P, P, C]`."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, BLOCK_C)
    present, inside = place < SIDE * SIDE, channel < C
    read = present[:, None] & inside[None, :]
    tokens = tokens_ptr + image * OF_SCALE * OF_SCALE
    row, row_rest = _source(place // SIDE, OF_SCALE, SIDE)  # pyright: ignore[reportGeneralTypeIssues]
    column, column_rest = _source(place % SIDE, OF_SCALE, SIDE)  # pyright: ignore[reportGeneralTypeIssues]
    y = tl.zeros((PLACES, BLOCK_C), tl.float32)
    for i in tl.static_range(-1, 3):
        of_row = tl.minimum(tl.maximum(row + i, 0), OF_SCALE - 1) * OF_SCALE
        sums = tl.zeros((PLACES, BLOCK_C), tl.float32)
        for j in tl.static_range(-1, 3):
            at = of_row + tl.minimum(tl.maximum(column + j, 0), OF_SCALE - 1)
            token = tl.load(tokens + at, mask=present, other=0)
            code = tl.load(codebook_ptr + token[:, None] * C + channel[None, :], mask=read, other=0.0)
            sums += _cubic_weight(column_rest, j)[:, None] * code.to(tl.float32)
        y += _cubic_weight(row_rest, i)[:, None] * sums
    tl.store(out_ptr + (image * SIDE * SIDE + place)[:, None] * C + channel[None, :], y, mask=read)


@triton.jit
def _convolve_and_add(
    enlarged_ptr,
    weight_ptr,
    bias_ptr,
    features_ptr,
    ratio,
    SIDE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Add `(1 - ratio) * h + ratio * conv3x3(h)` to the features of some places of an image."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, BLOCK_C)
    present, inside = place < SIDE * SIDE, channel < C
    row, column = place // SIDE, place % SIDE
    codes = enlarged_ptr + image * SIDE * SIDE * C
    weights = weight_ptr + channel[None, :] * (9 * C) + channel[:, None] * 9  # [inputs, outputs]
    both = inside[:, None] & inside[None, :]
    sums = tl.zeros((PLACES, BLOCK_C), tl.float32)
    for tap in range(9):
        i, j = row + tap // 3 - 1, column + tap % 3 - 1
        there = present & (i >= 0) & (i < SIDE) & (j >= 0) & (j < SIDE)
        read = there[:, None] & inside[None, :]
        h = tl.load(codes + (i * SIDE + j)[:, None] * C + channel[None, :], mask=read, other=0.0)
        w = tl.load(weights + tap, mask=both, other=0.0).to(tl.float32)
        sums = tl.dot(h, w, sums, input_precision="ieee")
    written = present[:, None] & inside[None, :]
    h = tl.load(codes + place[:, None] * C + channel[None, :], mask=written, other=0.0)
    sums += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = features_ptr + (image * C + channel)[None, :] * (SIDE * SIDE) + place[:, None]
    before = tl.load(places, mask=written, other=0.0).to(tl.float32)
    y = before + ((1 - ratio) * h + ratio * sums)
    tl.store(places, y.to(features_ptr.dtype.element_ty), mask=written)


@triton.jit
def _average(
    features_ptr,
    out_ptr,
    SIDE: tl.constexpr,
    NEXT: tl.constexpr,
    WINDOW: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Average the features of an image over the windows of some places of a smaller grid, `[B, q, q, C]`."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, BLOCK_C)
    present, inside = place < NEXT * NEXT, channel < C
    row, column = place // NEXT, place % NEXT
    first_row, first_column = row * SIDE // NEXT, column * SIDE // NEXT
    rows, columns = ((row + 1) * SIDE + NEXT - 1) // NEXT, ((column + 1) * SIDE + NEXT - 1) // NEXT
    maps = features_ptr + (image * C + channel)[None, :] * (SIDE * SIDE)
    sums = tl.zeros((PLACES, BLOCK_C), tl.float32)
    for step in range(WINDOW * WINDOW):
        i, j = first_row + step // WINDOW, first_column + step % WINDOW  # pyright: ignore[reportOperatorIssue]
        there = present & (i < rows) & (j < columns)
        read = there[:, None] & inside[None, :]
        sums += tl.load(maps + (i * SIDE + j)[:, None], mask=read, other=0.0).to(tl.float32)
    count = (rows - first_row) * (columns - first_column)
    y = sums / count.to(tl.float32)[:, None]
    written = present[:, None] & inside[None, :]
    target = out_ptr + (image * NEXT * NEXT + place)[:, None] * C + channel[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=written)
