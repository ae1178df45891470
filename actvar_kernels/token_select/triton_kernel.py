"""Select tokens in two Triton launches; normalise and modulate in one.

The first of the two makes the scores, and reads every number once. A launch between them ranks sequences of more than
`RANKED_TOKENS` tokens.
"""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from actvar_kernels.constants import NORM_EPS
from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.row_form import RowForm, formed
from actvar_kernels.triton_backend.rows import (
    TRITON_DTYPES,
    channels_last,
    descending_key,
    load_rows,
    load_vector,
    normalized,
    store_as,
)
from actvar_kernels.triton_backend.tiles import row_tiles, score_tiles, select_tiles

_EPS = tl.constexpr(NORM_EPS)
_LOWEST = tl.constexpr(-(2**31))
RANKED_TOKENS = 1024
"""Most tokens of a sequence that every program ranks anew."""


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
    in_place: bool,
    form: RowForm | None = None,
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    """Return index, modulated rows, scores and base, see `op.select_tokens`; the rows in a form, if there is one.

    With `in_place` the base is x. Otherwise it is new memory, in which the rows that were kept are not written.
    """
    R, L, C = x.shape
    x, scale, shift = channels_last(x, scale, shift)
    index = x.new_empty(R, keep, dtype=torch.int64)
    form = RowForm(x.dtype) if form is None else form
    modulated, modulated_scales = form.empty(x, R, keep, C)
    scores = x.new_empty(R, L, dtype=torch.float32)
    moments = x.new_empty(R, L, 2, dtype=torch.float32)  # mean and 1 / sqrt(variance + eps)
    base = None if in_place else x.new_empty(R, L, C)
    slots = keep if in_place else L
    deciding, ranked = R // 2 if share_guidance else R, None
    rows = score_tiles(C)
    _score[(triton.cdiv(L, rows.rows), R)](
        x,
        weight.contiguous(),
        bias,
        scores,
        moments,
        x.stride(),
        L,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=rows.rows,
        num_warps=rows.warps,
        enable_fp_fusion=True,
        **early_launch(x),
    )
    if L > RANKED_TOKENS:
        ranked = x.new_empty(deciding, L, dtype=torch.int32)
        _rank[(deciding,)](
            scores, ranked, L, keep, BLOCK_L=triton.next_power_of_2(L), num_warps=16, **early_launch(scores)
        )
    tiles = select_tiles(R, slots, C)
    _select[(triton.cdiv(slots, tiles.rows * tiles.steps), R)](
        x,
        scores,
        moments,
        ranked,
        scale,
        shift,
        index,
        modulated,
        modulated_scales,
        base,
        x.stride(),
        scale.stride(),
        shift.stride(),
        deciding,
        L,
        keep,
        BLOCK_L=triton.next_power_of_2(L) if ranked is None else 1,
        STEPS=tiles.steps,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        DTYPE=TRITON_DTYPES[form.dtype],
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        **early_launch(x),
    )
    return index, formed(modulated, modulated_scales, form), scores, x if base is None else base


def normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, guidance: float | None, form: RowForm | None = None
) -> Any:
    """Return what `reference.normalize_modulate` does, in a form, if there is one."""
    R, K, C = x.shape
    x, scale, shift = channels_last(x, scale, shift)
    form = RowForm(x.dtype) if form is None else form
    out, out_scales = form.empty(x, R if guidance is None else R // 2, K, C)
    tiles = row_tiles(R * K, C)
    _normalize_modulate[(triton.cdiv(K, tiles.rows), out.shape[0])](
        x,
        scale,
        shift,
        out,
        out_scales,
        x.stride(),
        scale.stride(),
        shift.stride(),
        K,
        guidance or 0.0,
        GUIDED=guidance is not None,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        DTYPE=TRITON_DTYPES[form.dtype],
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        **early_launch(x),
    )
    return formed(out, out_scales, form)


@triton.jit(do_not_specialize=["length"])
def _score(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scores_ptr,
    moments_ptr,
    x_strides,
    length,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store `LN(x) @ weight + bias` of `ROWS` rows of a sequence, and the moments of their LN.

    Each row is summed in the same order.
    """
    begin(PDL)
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    x = load_rows(x_ptr, x_strides, sequence, row, row < length, channel, inside).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    deviation = tl.where(inside[None, :], x - mean[:, None], 0.0)
    root = tl.rsqrt(tl.sum(deviation * deviation, axis=1) / C + _EPS)
    product = tl.sum(deviation * weight[None, :], axis=1)
    flat = sequence.to(tl.int64) * length + row
    tl.store(scores_ptr + flat, root * product + tl.load(bias_ptr).to(tl.float32), mask=row < length)
    tl.store(moments_ptr + 2 * flat, mean, mask=row < length)
    tl.store(moments_ptr + 2 * flat + 1, root, mask=row < length)


@triton.jit(do_not_specialize=["length", "keep"])
def _rank(scores_ptr, ranked_ptr, length, keep, BLOCK_L: tl.constexpr, PDL: tl.constexpr):
    """Store the tokens of a sequence in the order of their places."""
    begin(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_L)
    places = _places(scores_ptr + sequence * length, length, keep, BLOCK_L)
    tl.store(ranked_ptr + sequence * length + places, token, mask=token < length)


@triton.jit(do_not_specialize=["deciding", "length", "keep"])
def _select(
    x_ptr,
    scores_ptr,
    moments_ptr,
    ranked_ptr,
    scale_ptr,
    shift_ptr,
    index_ptr,
    modulated_ptr,
    modulated_scales_ptr,
    base_ptr,
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
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Put `STEPS * ROWS` rows of a sequence in the order of their places.

    Rows that are kept go to `modulated`, the others to the base if there is one. `deciding` sequences have a choice of
    their own, the ones after them take it over. Without `ranked` tokens by place each program ranks its sequence. The
    last sequences come first: the launch before has read them last, so that they are in the cache.
    """
    begin(PDL)
    sequence = tl.num_programs(1) - 1 - tl.program_id(1)
    decides = sequence % deciding
    token = tl.arange(0, BLOCK_L)
    if ranked_ptr is None:
        places = _places(scores_ptr + decides * length, length, keep, BLOCK_L)

    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    scale = load_vector(scale_ptr, scale_strides, sequence, channel, inside)
    shift = load_vector(shift_ptr, shift_strides, sequence, channel, inside)
    place = tl.program_id(0) * STEPS * ROWS + tl.arange(0, ROWS)
    for _ in range(STEPS):
        if ranked_ptr is not None:
            row = tl.load(ranked_ptr + decides.to(tl.int64) * length + place, mask=place < length, other=0)
        else:
            row = tl.sum(tl.where(places[None, :] == place[:, None], token[None, :], 0), axis=1)  # of [ROWS, BLOCK_L]
        kept = place < keep
        moments = moments_ptr + 2 * (sequence.to(tl.int64) * length + row)
        mean, root = tl.load(moments, mask=kept, other=0.0), tl.load(moments + 1, mask=kept, other=0.0)
        x = load_rows(x_ptr, x_strides, sequence, row, place < length, channel, inside)
        slot = sequence.to(tl.int64) * keep + place
        tl.store(index_ptr + slot, row.to(tl.int64), mask=kept)
        target = slot[:, None] * C + channel[None, :]
        normal = (x.to(tl.float32) - mean[:, None]) * root[:, None]
        modulated = normal * (1.0 + scale)[None, :] + shift[None, :]
        modulated = modulated.to(x.dtype)
        store_as(modulated_ptr, modulated_scales_ptr, modulated, target, slot, kept, inside, DTYPE)
        if base_ptr is not None:
            left = (place >= keep) & (place < length)
            source = (sequence.to(tl.int64) * length + row)[:, None] * C + channel[None, :]
            tl.store(base_ptr + source, x, mask=left[:, None] & inside[None, :])
        place += ROWS


@triton.jit
def _places(scores_ptr, length, keep, BLOCK_L: tl.constexpr):
    """Return the place of each of `length` scores.

    First come the `keep` highest in order of their index, behind them the others in order of theirs.
    """
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
    before = tl.cumsum(kept.to(tl.int32), axis=0)  # kept ones up to and with each
    return tl.where(kept, before - 1, keep + index - before)


@triton.jit(do_not_specialize=["length", "guidance"])
def _normalize_modulate(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    out_scales_ptr,
    x_strides,
    scale_strides,
    shift_strides,
    length,
    guidance,
    GUIDED: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise and modulate `ROWS` rows of a sequence."""
    begin(PDL)
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
    flat = sequence.to(tl.int64) * length + row
    target = flat[:, None] * C + channel[None, :]
    out = out.to(x_ptr.dtype.element_ty)
    store_as(out_ptr, out_scales_ptr, out, target, flat, row < length, inside, DTYPE)
