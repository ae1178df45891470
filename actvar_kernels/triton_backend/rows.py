"""Load, normalise and route whole rows of channels in Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.constants import NORM_EPS

_EPS = tl.constexpr(NORM_EPS)
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
_HALF_TO_EVEN = tl.constexpr(1.5 * 2**23)
_LARGEST_INT8 = tl.constexpr(127.0)
_LARGEST_E4M3 = tl.constexpr(448.0)
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def channels_last(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors with neighbouring channels next to each other in memory, copied where they are not."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


@triton.jit
def load_rows(ptr, strides, sequence, row, present, channel, inside):
    """Return rows `[ROWS, BLOCK_C]` of a sequence of a tensor `[R, length, C]`.

    Rows that are not `present` and channels that are not `inside` are 0.
    """
    offset = sequence.to(tl.int64) * strides[0] + row.to(tl.int64)[:, None] * strides[1] + channel[None, :]
    return tl.load(ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)


@triton.jit
def load_vector(ptr, strides, sequence, channel, inside):
    """Return the vector `[BLOCK_C]` of a sequence of a tensor `[R, 1, C]`, in float32 and 0 outside."""
    offset = sequence.to(tl.int64) * strides[0] + channel
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalized(x, inside, C: tl.constexpr):
    """Return LN of `x` `[ROWS, BLOCK_C]` float32; both are 0 where a channel is not `inside`."""
    mean = tl.sum(x, axis=1) / C
    deviation = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(deviation * deviation, axis=1) / C
    return deviation * tl.rsqrt(variance + _EPS)[:, None]


@triton.jit
def row_bytes(x, values_ptr):
    """Return `x` `[ROWS, BLOCK_C]` float32, 0 outside, in eight bits, and the scales of the rows.

    They are in the dtype of `values_ptr`, int8 or float8e4nv; `quantized.quantize` defines the result.

    Without fused sums every number is that of the reference.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN is above infinity, and infinity above all numbers
    MOST: tl.constexpr = _LARGEST_INT8 if values_ptr.dtype.element_ty == tl.int8 else _LARGEST_E4M3
    scale = tl.div_rn(tl.max(bits, axis=1).to(tl.float32, bitcast=True), MOST)
    divides = (scale > 0) & (scale < float("inf"))
    quotient = tl.div_rn(x, tl.where(divides, scale, 1.0)[:, None])
    quotient = tl.where(divides[:, None], tl.minimum(tl.maximum(quotient, -MOST), MOST), 0.0)
    if values_ptr.dtype.element_ty == tl.int8:
        quotient = (quotient + _HALF_TO_EVEN) - _HALF_TO_EVEN
    return quotient.to(values_ptr.dtype.element_ty), scale


@triton.jit
def store_as(ptr, scales_ptr, x, target, row, present, inside, DTYPE: tl.constexpr):
    """Store rows `x` `[ROWS, BLOCK_C]` in `DTYPE`, or with `scales_ptr` such rows in eight bits, and their scales.

    Args:
        target: places of all numbers, `[ROWS, BLOCK_C]`.
        row: places of the scales, `[ROWS]`.
    """
    x = x.to(DTYPE)
    written = present[:, None] & inside[None, :]
    if scales_ptr is None:
        tl.store(ptr + target, x, mask=written)
    else:
        x = tl.where(inside[None, :], x.to(tl.float32), 0.0)
        values, scale = row_bytes(x, ptr)  # pyright: ignore[reportGeneralTypeIssues] it is compiled
        tl.store(ptr + target, values, mask=written)
        tl.store(scales_ptr + row, scale, mask=present)


@triton.jit
def descending_key(score):
    """Return an int32 above -2^31 that compares as `torch.sort(descending=True)` compares float32.

    NaN is the highest and equal to itself, and -0 equals 0.
    """
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _HIGHEST, bits)
    return tl.where(score == score, key, _HIGHEST)


@triton.jit
def route(
    u,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    logits_ptr,
    token,
    written,
    active,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the logits of rows `u`, and a mask of the `active` experts of each.

    `u` is `[ROWS, BLOCK_C]`, 0 outside C. Every row is summed in the same order. With `SPLITS` the products are those
    of `_logits_of_parts`, otherwise sums of float32 numbers, an expert after the other. An expert is chosen by counting
    those that go before it.
    """
    BLOCK_N: tl.constexpr = max(16 if SPLITS else 1, triton.next_power_of_2(EXPERTS))
    expert = tl.arange(0, BLOCK_N)
    if SPLITS:
        logits = _logits_of_parts(u, weight_ptr, 0, EXPERTS, C, BLOCK_N, SPLITS)
    else:
        channel = tl.arange(0, BLOCK_C)
        logits = tl.zeros((u.shape[0], BLOCK_N), tl.float32)
        for e in range(0, EXPERTS):
            weight = tl.load(weight_ptr + e * C + channel, mask=channel < C, other=0.0).to(tl.float32)
            product = tl.sum(u.to(tl.float32) * weight[None, :], axis=1)  # [ROWS]
            logits += tl.where(expert[None, :] == e, product[:, None], 0.0)
    logits += tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)[None, :]

    key = tl.where(expert[None, :] < EXPERTS, descending_key(logits), _LOWEST)
    mine, other = key[:, :, None], key[:, None, :]
    before = (other > mine) | ((other == mine) & (expert[None, None, :] < expert[None, :, None]))
    chosen = tl.sum(before.to(tl.int32), axis=2) < active
    target = token[:, None] * EXPERTS + expert[None, :]
    written = written[:, None] & (expert[None, :] < EXPERTS)
    tl.store(logits_ptr + target, logits, mask=written)
    tl.store(mask_ptr + target, chosen, mask=written)


@triton.jit
def _logits_of_parts(
    u,
    weight_ptr,
    FIRST: tl.constexpr,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Return the products `[ROWS, BLOCK_N]` of bfloat16 rows `u` with finite weights from channel `FIRST` on.

    A weight of more digits is the sum of three numbers of bfloat16, so that every product is exact, and sums are in
    float32. Each of the `SPLITS` parts of the channels is summed apart, and their sums are added in a fixed order. One
    half of many channels follows the other, so that few weights are in registers and shared memory.
    """
    ROWS: tl.constexpr = u.shape[0]
    CHANNELS: tl.constexpr = u.shape[1]
    if CHANNELS > 512:
        HALF: tl.constexpr = CHANNELS // 2
        first, second = tl.split(tl.permute(tl.reshape(u, (ROWS, 2, HALF)), (0, 2, 1)))
        logits = _logits_of_parts(first, weight_ptr, FIRST, EXPERTS, C, BLOCK_N, SPLITS)
        logits += _logits_of_parts(second, weight_ptr, FIRST + HALF, EXPERTS, C, BLOCK_N, SPLITS)
    else:
        DEPTH: tl.constexpr = CHANNELS // SPLITS
        channel = FIRST + tl.arange(0, SPLITS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, :, None]
        expert = tl.arange(0, BLOCK_N)[None, None, :]
        present = (channel < C) & (expert < EXPERTS)
        weight = tl.load(weight_ptr + expert * C + channel, mask=present, other=0.0)
        rows = tl.permute(tl.reshape(u, (ROWS, SPLITS, DEPTH)), (1, 0, 2))
        if weight.dtype == tl.bfloat16:
            products = tl.dot(rows, weight)
        else:
            weight = weight.to(tl.float32)
            high = weight.to(tl.bfloat16)
            weight -= high.to(tl.float32)
            middle = weight.to(tl.bfloat16)
            low = (weight - middle.to(tl.float32)).to(tl.bfloat16)
            products = tl.dot(rows, high, tl.dot(rows, middle, tl.dot(rows, low)))
        logits = tl.sum(products, axis=0)
    return logits
