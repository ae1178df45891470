"""Token selection in two Triton launches (scores; the rest), and LayerNorm with modulation in one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.tiles import row_tiles, select_steps
from actvar_kernels.token_select.reference import NORM_EPS

_EPS = tl.constexpr(NORM_EPS)
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
    in_place: bool,
) -> tuple[torch.Tensor, ...]:
    """`index`, `modulated`, `scores` and `rest` as in `reference.select_tokens`; `rest` is x with `in_place`, else new
    memory, of which the rows that were kept are not written."""
    R, L, C = x.shape
    x, scale, shift = channels_last(x, scale, shift)
    index = x.new_empty(R, keep, dtype=torch.int64)
    modulated = x.new_empty(R, keep, C)
    scores = x.new_empty(R, L, dtype=torch.float32)
    rest = None if in_place else x.new_empty(R, L, C)
    tiles = row_tiles(R * L, C)
    steps = select_steps(R * L, tiles.rows)
    sizes = dict(C=C, BLOCK_C=triton.next_power_of_2(C), ROWS=tiles.rows, num_warps=tiles.warps, enable_fp_fusion=True)
    _score[(triton.cdiv(L, tiles.rows), R)](x, weight.contiguous(), bias, scores, x.stride(), L, **sizes)
    _select[(triton.cdiv(L, tiles.rows * steps), R)](
        x,
        scores,
        scale,
        shift,
        index,
        modulated,
        rest,
        x.stride(),
        scale.stride(),
        shift.stride(),
        R // 2 if share_guidance else R,
        L,
        keep,
        BLOCK_L=triton.next_power_of_2(L),
        STEPS=steps,
        **sizes,
    )
    return index, modulated, scores, x if in_place else rest


def normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, guidance: float | None
) -> torch.Tensor:
    """As `reference.normalize_modulate`."""
    R, K, C = x.shape
    x, scale, shift = channels_last(x, scale, shift)
    out = x.new_empty(R if guidance is None else R // 2, K, C)
    tiles = row_tiles(R * K, C)
    _normalize_modulate[(triton.cdiv(K, tiles.rows), out.shape[0])](
        x,
        scale,
        shift,
        out,
        x.stride(),
        scale.stride(),
        shift.stride(),
        K,
        guidance or 0.0,
        GUIDED=guidance is not None,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        num_warps=tiles.warps,
        enable_fp_fusion=True,
    )
    return out


def channels_last(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with neighbouring channels next to each other in memory, copied where they are not."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


@triton.jit(do_not_specialize=["length"])
def _score(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scores_ptr,
    x_strides,
    length,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`LN(x) @ weight + bias` of some rows of a sequence, each summed in the same order."""
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    x = load_rows(x_ptr, x_strides, sequence, row, row < length, channel, inside).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    scores = tl.sum(normalized(x, inside, C) * weight[None, :], axis=1) + tl.load(bias_ptr).to(tl.float32)
    tl.store(scores_ptr + sequence * length + row, scores, mask=row < length)


@triton.jit(do_not_specialize=["deciding", "length", "keep"])
def _select(
    x_ptr,
    scores_ptr,
    scale_ptr,
    shift_ptr,
    index_ptr,
    modulated_ptr,
    rest_ptr,
    x_strides,
    scale_strides,
    shift_strides,
    deciding,
    length,
    keep,
    BLOCK_L: tl.constexpr,
    STEPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`STEPS * ROWS` rows of a sequence: those that are kept go to their places in `modulated`, the others to `rest` if
    there is one. `deciding` sequences have a choice of their own, the ones after them take it over."""
    sequence = tl.program_id(1)
    row = tl.program_id(0) * STEPS * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    scale = load_vector(scale_ptr, scale_strides, sequence, channel, inside)
    shift = load_vector(shift_ptr, shift_strides, sequence, channel, inside)
    places = _places(scores_ptr + sequence % deciding * length, length, keep, BLOCK_L)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    for _ in range(STEPS):
        mine = tl.arange(0, BLOCK_L)[None, :] == row[:, None]  # [ROWS, BLOCK_L]
        place = tl.sum(tl.where(mine, places[None, :], 0), axis=1)
        kept = (row < length) & (place >= 0)
        needed = kept if rest_ptr is None else row < length
        x = load_rows(x_ptr, x_strides, sequence, row, needed, channel, inside)
        slot = sequence.to(tl.int64) * keep + place
        tl.store(index_ptr + slot, row.to(tl.int64), mask=kept)
        target = slot[:, None] * C + channel[None, :]
        modulated = normalized(x.to(tl.float32), inside, C) * (1.0 + scale)[None, :] + shift[None, :]
        tl.store(modulated_ptr + target, modulated.to(dtype), mask=kept[:, None] & inside[None, :])
        if rest_ptr is not None:
            source = (sequence.to(tl.int64) * length + row)[:, None] * C + channel[None, :]
            tl.store(rest_ptr + source, x, mask=((row < length) & (place < 0))[:, None] & inside[None, :])
        row += ROWS


@triton.jit
def _places(scores_ptr, length, keep, BLOCK_L: tl.constexpr):
    """For each of `length` scores its position among the `keep` highest in order of their index, -1 if not kept."""
    index = tl.arange(0, BLOCK_L)
    key = descending_key(tl.load(scores_ptr + index, mask=index < length, other=0.0))
    key = tl.where(index < length, key, _LOWEST)
    # the keep-th highest key, a few bits at a time from the highest on: the largest number that so many keys reach
    BITS: tl.constexpr = 4 if BLOCK_L <= 256 else 2
    digit = tl.arange(0, 2**BITS)
    threshold = _LOWEST
    for shift in tl.static_range(32 - BITS, -1, -BITS):
        candidate = threshold ^ (digit << shift)
        reached = tl.sum((key[:, None] >= candidate[None, :]).to(tl.int32), axis=0)
        threshold = threshold ^ ((tl.sum((reached >= keep).to(tl.int32), axis=0) - 1) << shift)
    higher = key > threshold
    equal = key == threshold
    left = keep - tl.sum(higher.to(tl.int32), axis=0)
    kept = higher | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= left))
    return tl.where(kept, tl.cumsum(kept.to(tl.int32), axis=0) - 1, -1)


@triton.jit
def descending_key(score):
    """Int32 above -2^31 that compares as `torch.sort(descending=True)` compares float32: NaN is the highest, equal to
    itself, and -0 equals 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _HIGHEST, bits)
    return tl.where(score == score, key, _HIGHEST)


@triton.jit(do_not_specialize=["length", "guidance"])
def _normalize_modulate(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    x_strides,
    scale_strides,
    shift_strides,
    length,
    guidance,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    out = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for half in tl.static_range(2 if GUIDED else 1):
        source = sequence + half * tl.num_programs(1)
        x = load_rows(x_ptr, x_strides, source, row, row < length, channel, inside).to(tl.float32)
        scale = load_vector(scale_ptr, scale_strides, source, channel, inside)
        shift = load_vector(shift_ptr, shift_strides, source, channel, inside)
        y = normalized(x, inside, C) * (1.0 + scale)[None, :] + shift[None, :]
        if GUIDED:
            out += (1.0 + guidance if half == 0 else -guidance) * y
        else:
            out = y
    target = (sequence.to(tl.int64) * length + row)[:, None] * C + channel[None, :]
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=(row < length)[:, None] & inside[None, :])


@triton.jit
def normalized(x, inside, C: tl.constexpr):
    """LN of `x` `[ROWS, BLOCK_C]` float32, which is 0 where a channel is not `inside`; so is the result."""
    mean = tl.sum(x, axis=1) / C
    deviation = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(deviation * deviation, axis=1) / C
    return deviation * tl.rsqrt(variance + _EPS)[:, None]


@triton.jit
def load_rows(ptr, strides, sequence, row, present, channel, inside):
    """Rows `[ROWS, BLOCK_C]` of a sequence of a tensor `[R, length, C]`; 0 where a row is not `present` and outside."""
    offset = sequence.to(tl.int64) * strides[0] + row.to(tl.int64)[:, None] * strides[1] + channel[None, :]
    return tl.load(ptr + offset, mask=present[:, None] & inside[None, :], other=0.0)


@triton.jit
def load_vector(ptr, strides, sequence, channel, inside):
    """The vector `[BLOCK_C]` of a sequence of a tensor `[R, 1, C]`, in float32; 0 outside."""
    offset = sequence.to(tl.int64) * strides[0] + channel
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)
