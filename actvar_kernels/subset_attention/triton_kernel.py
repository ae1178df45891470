"""Attend in one Triton launch: QK norm, head scale, attention and the append to the cache."""

# A launch takes options that the kernel does not name; a number is a constexpr in a kernel.
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from actvar_kernels.triton_backend.attention_tiles import attention_tiles
from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.tiles import architecture
from actvar_kernels.triton_backend.tuned_choices import tuned_attention


def subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    cached: int,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    mask: torch.Tensor | None,
    append: bool,
) -> torch.Tensor:
    """Return attention of `q` over the first `cached` rows of `keys` and `values` and over `k` and `v`.

    Args:
        q: `[R, H, K, d]`, floating-point, any strides; d a power of two from 16 to 128.
        k, v: `[R, H, T, d]`, floating-point, any strides.
        keys, values: the cache `[R, H, at least cached (+ T to append), d]`, any strides; None without one.
        cached: rows of the cache that are attended to.
        head_scale: `[H]`, floating-point; None: no QK norm.
        softmax_scale: factor of the scores.
        mask: additive, broadcastable to `[R, H, K, cached + T]`, or None; it leaves every query at least one key.
        append: whether to write the normalised `k`, and `v`, to the rows of the cache after the first `cached`.

    Returns:
        `[R, K, H * d]` in v's dtype.
    """
    R, H, K, d = q.shape
    T = k.shape[2]
    out = v.new_empty(R, K, H * d)
    if keys is None or values is None:
        keys, values = k, v
    if mask is not None:
        mask = mask.expand(R, H, K, cached + T)
    measured = None if mask is not None else tuned_attention(q, v.dtype, keys=cached + T)
    tiles = attention_tiles(architecture(q), v.dtype, d, mask is not None, measured)
    query_tiles = triton.cdiv(K, tiles.queries)
    _attention[(query_tiles * R * H,)](
        q,
        k,
        v,
        keys,
        values,
        head_scale,
        mask,
        out,
        q.stride(),
        k.stride(),
        v.stride(),
        keys.stride(),
        values.stride(),
        None if head_scale is None else head_scale.stride(0),
        None if mask is None else mask.stride(),
        K,
        cached,
        T,
        softmax_scale * math.log2(math.e),
        HEADS=H,
        HEAD_DIM=d,
        APPEND=append,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_OWN=tiles.own_keys,
        OWN_STAGES=tiles.own_stages,
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        num_stages=tiles.stages,
        **early_launch(q),
    )
    return out


@triton.jit(do_not_specialize=["queries", "cached", "own"])
def _attention(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    head_scale_ptr,
    mask_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    keys_strides,
    values_strides,
    head_scale_stride,
    mask_strides,
    queries,
    cached,
    own,
    log2_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    APPEND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    OWN_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with one tile of queries of one head; neighbouring programs share the keys of the head.

    Scores are in units of log 2.
    """
    begin(PDL)
    query_tiles = tl.cdiv(queries, BLOCK_Q)
    query_tile = tl.program_id(0) % query_tiles
    row = (tl.program_id(0) // query_tiles // HEADS).to(tl.int64)
    head = tl.program_id(0) // query_tiles % HEADS
    dtype: tl.constexpr = v_ptr.dtype.element_ty

    query = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, HEAD_DIM)
    k_ptr += row * k_strides[0] + head * k_strides[1] + channel[None, :] * k_strides[3]
    v_ptr += row * v_strides[0] + head * v_strides[1] + channel[None, :] * v_strides[3]
    keys_ptr += row * keys_strides[0] + head * keys_strides[1] + channel[None, :] * keys_strides[3]
    values_ptr += row * values_strides[0] + head * values_strides[1] + channel[None, :] * values_strides[3]
    if mask_ptr is not None:
        mask_ptr += row * mask_strides[0] + head * mask_strides[1] + query[:, None] * mask_strides[2]

    q_ptr += row * q_strides[0] + head * q_strides[1] + channel[None, :] * q_strides[3]
    q = tl.load(q_ptr + query[:, None] * q_strides[2], mask=query[:, None] < queries, other=0.0).to(tl.float32)
    if head_scale_ptr is not None:
        q = _normalize(q) * tl.load(head_scale_ptr + head * head_scale_stride).to(tl.float32)
    q = (q * log2_scale).to(dtype)  # [BLOCK_Q, HEAD_DIM]

    out = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    highest = tl.full((BLOCK_Q,), -1e30, tl.float32)  # finite: a mask may hide whole tiles
    total = tl.zeros((BLOCK_Q,), tl.float32)

    whole = cached // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        k, v = _tile(keys_ptr, keys_strides, values_ptr, values_strides, start, cached, BLOCK_K, False)
        scores = _scores(q, k.to(dtype), mask_ptr, mask_strides, query, queries, start, start + BLOCK_K, False)
        out, highest, total = _online_softmax(scores, v.to(dtype), out, highest, total)
    if whole < cached:
        k, v = _tile(keys_ptr, keys_strides, values_ptr, values_strides, whole, cached, BLOCK_K, True)
        scores = _scores(q, k.to(dtype), mask_ptr, mask_strides, query, queries, whole, cached, True)
        out, highest, total = _online_softmax(scores, v.to(dtype), out, highest, total)

    appended = tl.where(query_tile == 0, own, 0)  # one program of the head writes its keys and values
    for start in tl.range(0, own, BLOCK_OWN, num_stages=OWN_STAGES):
        k, v = _tile(k_ptr, k_strides, v_ptr, v_strides, start, own, BLOCK_OWN, True)
        if head_scale_ptr is not None:
            k = _normalize(k.to(tl.float32))
        k, v = k.to(dtype), v.to(dtype)
        if APPEND:
            index = start + tl.arange(0, BLOCK_OWN)
            written = (index < appended)[:, None]
            tl.store(keys_ptr + (cached + index)[:, None] * keys_strides[2], k, mask=written)
            tl.store(values_ptr + (cached + index)[:, None] * values_strides[2], v, mask=written)
        scores = _scores(q, k, mask_ptr, mask_strides, query, queries, cached + start, cached + own, True)
        out, highest, total = _online_softmax(scores, v, out, highest, total)

    out_ptr += ((row * queries + query[:, None]) * HEADS + head) * HEAD_DIM + channel[None, :]
    tl.store(out_ptr, (out / total[:, None]).to(dtype), mask=query[:, None] < queries)


@triton.jit
def _normalize(x):
    """Return rows `[N, d]` in float32 divided by their norm, or by 1e-12."""
    return x * (1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12))[:, None]


@triton.jit
def _tile(k_ptr, k_strides, v_ptr, v_strides, start, end, BLOCK: tl.constexpr, PARTIAL: tl.constexpr):
    """Return keys and values `[BLOCK, d]` from `start` on; with `PARTIAL` zero from `end` on."""
    index = (start + tl.arange(0, BLOCK))[:, None]
    if PARTIAL:
        k = tl.load(k_ptr + index * k_strides[2], mask=index < end, other=0.0)
        v = tl.load(v_ptr + index * v_strides[2], mask=index < end, other=0.0)
    else:
        k = tl.load(k_ptr + index * k_strides[2])
        v = tl.load(v_ptr + index * v_strides[2])
    return k, v


@triton.jit
def _scores(q, k, mask_ptr, mask_strides, query, queries, start, end, PARTIAL: tl.constexpr):
    """Return `q k^T + mask` `[BLOCK_Q, keys]` of the keys from `start` on.

    With `PARTIAL` scores are -inf from `end` on.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    index = start + tl.arange(0, k.shape[0])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if mask_ptr is not None:
        visible = (query[:, None] < queries) & (index[None, :] < end)
        added = tl.load(mask_ptr + index[None, :] * mask_strides[3], mask=visible, other=0.0)
        scores += added.to(tl.float32) * LOG2_E
    if PARTIAL:
        scores = tl.where(index[None, :] < end, scores, -float("inf"))
    return scores


@triton.jit
def _online_softmax(scores, v, out, highest, total):
    """Add a tile of keys: `out` `[BLOCK_Q, d]` and `total` are relative to `exp2(highest)`."""
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    correction = tl.exp2(highest - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * correction + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * correction[:, None], input_precision="ieee")
    return out, higher, total
