"""Convolve by 3x3 in one Triton launch, with bias, residual and the moments of the next norm."""

# A launch takes options that the kernel does not name; Triton's own functions have no results outside a kernel.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.triton_backend.conv_tiles import ConvTiles
from actvar_kernels.triton_backend.products import add_product
from actvar_kernels.triton_backend.tiles import cdiv


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    measured: bool,
    tiles: ConvTiles,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `F.conv2d(x, weight, bias, padding=1) + residual` with one rounding, and moments if they are `measured`.

    Args:
        x: `[B, C, H, W]`, float32, float16 or bfloat16, in the memory format `channels_last`.
        weight: `[D, C, 3, 3]`, floating-point. A copy in x's dtype is kept.
        bias: `[D]`, floating-point, or None.
        residual: `[B, D, H, W]` in x's dtype and memory format, or None.
        measured: whether mean and sum of squared deviations of every channel are wanted.
        tiles: from `conv_tiles.candidates`.

    Returns:
        `[B, D, H, W]` in x's dtype and memory format, and None or moments `[B, 2, parts, D]` float32 of parts of
        `tiles.pixels` pixels, in their order.
    """
    B, C, H, W = x.shape
    D = weight.shape[0]
    out = torch.empty((B, D, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    parts = cdiv(H * W, tiles.pixels)
    moments = torch.empty(B, 2, parts, D, dtype=torch.float32, device=x.device) if measured else None
    taps = packed((weight,), ("taps", x.dtype), functools.partial(_by_taps, weight, x.dtype))
    pixels, columns, tail = x, taps, taps
    if tiles.takes_descriptors(C, W):
        box = [1, max(1, tiles.pixels // W), min(tiles.pixels, W), tiles.depth]
        pixels = TensorDescriptor.from_tensor(x.permute(0, 2, 3, 1), box)
        columns = TensorDescriptor.from_tensor(taps, [tiles.columns, tiles.depth])
        tail = TensorDescriptor.from_tensor(taps, [tiles.tail, tiles.depth]) if tiles.tail else None
    _conv3x3[(parts * cdiv(D, tiles.columns + tiles.tail), B)](
        pixels,
        columns,
        tail,
        bias,
        residual,
        out,
        moments,
        H,
        W,
        parts,
        C=C,
        D=D,
        BLOCK_P=tiles.pixels,
        BLOCK_D=tiles.columns,
        TAIL_D=tiles.tail,
        BLOCK_K=tiles.depth,
        DESCRIPTORS=tiles.takes_descriptors(C, W),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=True,
    )
    return out, moments


def _by_taps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a kernel `[D, C, 3, 3]` as `[9 * D, C]`: one matrix after the other, row by row of the kernel."""
    return weight.detach().to(dtype).permute(2, 3, 0, 1).flatten(0, 2).contiguous()


@triton.jit(do_not_specialize=["height", "parts"])
def _conv3x3(
    x,
    taps,
    taps_tail,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    height,
    width,
    parts,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Compute `BLOCK_D + TAIL_D` outputs of `BLOCK_P` neighbouring pixels of an image.

    `x` and `taps` are pointers or descriptors. Pixels outside of the image are 0, which descriptors give by themselves.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D + TAIL_D - 1) // (BLOCK_D + TAIL_D)
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    image = tl.program_id(1)
    part = tl.program_id(0) // BLOCKS
    first = tl.program_id(0) % BLOCKS * (BLOCK_D + TAIL_D)
    start = part * BLOCK_P
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if TAIL_D:
        tail = tl.zeros((BLOCK_P, TAIL_D), tl.float32)
    for step in range(0, 9 * STEPS):
        tap, k = step // STEPS, step % STEPS * BLOCK_K
        down, right = tap // 3 - 1, tap % 3 - 1
        if DESCRIPTORS:
            pixels = x.load([image, start // width + down, start % width + right, k]).reshape([BLOCK_P, BLOCK_K])
            acc = add_product(acc, pixels, taps.load([tap * D + first, k]))
            if TAIL_D:
                tail = add_product(tail, pixels, taps_tail.load([tap * D + first + BLOCK_D, k]))
        else:
            pixels = _load_pixels(x, image, start, down, right, k, height, width, C, BLOCK_P, BLOCK_K)
            acc = add_product(acc, pixels, _load_weights(taps, tap, first, k, C, D, BLOCK_D, BLOCK_K))
            if TAIL_D:
                tail = add_product(tail, pixels, _load_weights(taps, tap, first + BLOCK_D, k, C, D, TAIL_D, BLOCK_K))
    positions = height * width
    _store_outputs(acc, first, image, part, bias_ptr, residual_ptr, out_ptr, moments_ptr, positions, parts, D)
    if TAIL_D:
        first += BLOCK_D
        _store_outputs(tail, first, image, part, bias_ptr, residual_ptr, out_ptr, moments_ptr, positions, parts, D)


@triton.jit
def _load_pixels(
    x_ptr, image, start, down, right, k, height, width, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return `BLOCK_K` channels of the neighbours of `BLOCK_P` pixels, 0 outside of the image."""
    pixel = start + tl.arange(0, BLOCK_P)
    row, column = pixel // width + down, pixel % width + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    channel = k + tl.arange(0, BLOCK_K)
    source = (image.to(tl.int64) * height * width + row * width + column)[:, None] * C + channel[None, :]
    return tl.load(x_ptr + source, mask=inside[:, None] & (channel < C)[None, :], other=0.0)


@triton.jit
def _load_weights(
    taps_ptr, tap, first, k, C: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return the weights `[BLOCK_D, BLOCK_K]` of a tap, 0 outside of them."""
    output, channel = first + tl.arange(0, BLOCK_D), k + tl.arange(0, BLOCK_K)
    inside = (output < D)[:, None] & (channel < C)[None, :]
    return tl.load(taps_ptr + (tap * D + output)[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store_outputs(
    acc,
    first,
    image,
    part,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    positions,
    parts,
    D: tl.constexpr,
):
    """Add bias and residual to outputs `[BLOCK_P, BLOCK_D]`, store them, and measure what was stored."""
    BLOCK_P: tl.constexpr = acc.shape[0]
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    output = first + tl.arange(0, acc.shape[1])
    present = (pixel < positions)[:, None] & (output < D)[None, :]
    place = (image.to(tl.int64) * positions + pixel)[:, None] * D + output[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + output, mask=output < D, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + place, mask=present, other=0.0).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, out, mask=present)
    if moments_ptr is not None:
        count = tl.minimum(BLOCK_P, positions - part * BLOCK_P).to(tl.float32)
        stored = tl.where(present, out.to(tl.float32), 0.0)
        mean = tl.sum(stored, axis=0) / count
        deviation = tl.where(present, stored - mean[None, :], 0.0)
        target = moments_ptr + (image.to(tl.int64) * 2 * parts + part) * D + output
        tl.store(target, mean, mask=output < D)
        tl.store(target + parts * D, tl.sum(deviation * deviation, axis=0), mask=output < D)
