"""Sort tokens by their experts in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from actvar_kernels.triton_backend import tiles
from actvar_kernels.triton_backend.early_launch import begin, early_launch


def sort_by_experts(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the stable order of the tokens by `reference.sort_key`, and the experts that each token of it chose.

    Args:
        mask: `[T, N]` uint8, 0 or 1.

    Returns:
        order `[T]` int32; experts as bits, expert 0 the lowest, `[T]` int32.
    """
    T, N = mask.shape
    order, bits = mask.new_empty(T, dtype=torch.int32), mask.new_empty(T, dtype=torch.int32)
    words = (F.pad(mask, (0, -N % 4)) if N % 4 else mask).view(torch.int32)
    tile = tiles.SORT
    _sort_rows[(triton.cdiv(T, tile.rows),)](
        words,
        order,
        bits,
        T,
        WORDS=words.shape[1],
        BLOCK_T=tile.rows,
        CHUNK=tile.chunk,
        num_warps=tile.warps,
        enable_fp_fusion=True,
        **early_launch(mask),
    )
    return order, bits


@triton.jit(do_not_specialize=["T"])
def _sort_rows(
    words_ptr,
    order_ptr,
    bits_ptr,
    T,
    WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the places of one block of rows.

    The program puts the block in order. Then it counts for each row the tokens before the block whose key is not
    higher, and the tokens after the block whose key is lower.
    """
    begin(PDL)
    first = tl.program_id(0) * BLOCK_T
    local = tl.arange(0, BLOCK_T)
    row = first + local
    inside = row < T
    keys = tl.where(inside, _keys(words_ptr, row, T, WORDS), 0xFFFFFFFF).to(tl.uint32)
    rank = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, BLOCK_T, 16):
        other = start + tl.arange(0, 16)
        other_keys = tl.gather(keys, other, 0)[None, :]
        tie = (other_keys == keys[:, None]) & (other[None, :] < local[:, None])
        rank += tl.sum(((other_keys < keys[:, None]) | tie).to(tl.int32), 1)
    own = tl.zeros((BLOCK_T,), tl.uint32)
    for start in range(0, BLOCK_T, 16):
        other = start + tl.arange(0, 16)
        placed = tl.gather(rank, other, 0)[None, :] == local[:, None]
        own += tl.sum(tl.where(placed, tl.gather(keys, other, 0)[None, :], 0), 1).to(tl.uint32)

    others = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, first, CHUNK):
        others += _count_others(words_ptr, own, start, first, False, WORDS, BLOCK_T, CHUNK)
    for start in range(first + BLOCK_T, T, CHUNK):
        others += _count_others(words_ptr, own, start, T, True, WORDS, BLOCK_T, CHUNK)
    position = tl.gather(tl.cumsum(others, 0), rank, 0) + rank

    bits = tl.zeros((BLOCK_T,), tl.uint32)
    for word in tl.static_range(WORDS):
        bits |= _packed(words_ptr + row * WORDS + word, inside, 0x01020408) << (4 * word)
    tl.store(order_ptr + position, row, mask=inside)
    tl.store(bits_ptr + position, bits.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _packed(pointers, inside, FACTOR: tl.constexpr):
    """Return four bytes of 0 or 1 as four bits.

    The product moves them next to each other, from bit 24 on. A factor of 0x08040201 makes the first byte the highest
    bit, 0x01020408 the lowest.
    """
    word = tl.load(pointers, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return (word * FACTOR) >> 24


@triton.jit
def _keys(words_ptr, row, end, WORDS: tl.constexpr):
    """Return `reference.sort_key` as uint32.

    Experts that were filled up as not chosen do not change the order.
    """
    keys = tl.zeros(row.shape, tl.uint32)
    for word in tl.static_range(WORDS):
        keys = (keys << 4) | _packed(words_ptr + row * WORDS + word, row < end, 0x08040201)
    keys ^= keys >> 1
    keys ^= keys >> 2
    keys ^= keys >> 4
    keys ^= keys >> 8
    keys ^= keys >> 16
    return keys


@triton.jit
def _count_others(
    words_ptr,
    own,
    start,
    end,
    AFTER: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the tokens of a chunk that have their place right before each of the sorted keys `own`, by binary search.

    Tokens of an equal key come before it, or behind it where the chunk lies `AFTER` the block.
    """
    row = start + tl.arange(0, CHUNK)
    keys = _keys(words_ptr, row, end, WORDS)
    place = tl.zeros((CHUNK,), tl.int32)
    for halving in tl.static_range(1, BLOCK_T.bit_length()):
        probe = tl.gather(own, place + ((BLOCK_T >> halving) - 1), 0)
        place += tl.where((probe <= keys) if AFTER else (probe < keys), BLOCK_T >> halving, 0)
    probe = tl.gather(own, place, 0)
    place += ((probe <= keys) if AFTER else (probe < keys)).to(tl.int32)
    return tl.histogram(place, BLOCK_T, mask=(row < end) & (place < BLOCK_T))
