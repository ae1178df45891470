"""Scatter in one Triton launch, in place."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.rows import channels_last, load_rows, load_vector
from actvar_kernels.triton_backend.tiles import row_tiles


def scatter_rows(
    base: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> None:
    """Write what `reference.scatter_rows` returns to `base`, with one rounding of the sum."""
    R, K, C = rows.shape
    rows, update, gamma = channels_last(rows, update, gamma)
    tiles = row_tiles(R * K, C)
    _scatter_rows[(triton.cdiv(K, tiles.rows), R)](
        base,
        index,
        rows,
        update,
        gamma,
        base.stride(),
        index.stride(),
        rows.stride(),
        update.stride(),
        gamma.stride(),
        K,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        **early_launch(rows),
    )


@triton.jit(do_not_specialize=["length"])
def _scatter_rows(
    base_ptr,
    index_ptr,
    rows_ptr,
    update_ptr,
    gamma_ptr,
    base_strides,
    index_strides,
    rows_strides,
    update_strides,
    gamma_strides,
    length,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scatter `ROWS` rows of a sequence."""
    begin(PDL)
    sequence = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    index = tl.load(
        index_ptr + sequence.to(tl.int64) * index_strides[0] + row * index_strides[1], mask=row < length, other=0
    )
    rows = load_rows(rows_ptr, rows_strides, sequence, row, row < length, channel, inside).to(tl.float32)
    update = load_rows(update_ptr, update_strides, sequence, row, row < length, channel, inside).to(tl.float32)
    gamma = load_vector(gamma_ptr, gamma_strides, sequence, channel, inside)
    out = rows + gamma[None, :] * update
    target = (
        sequence.to(tl.int64) * base_strides[0] + index[:, None] * base_strides[1] + channel[None, :] * base_strides[2]
    )
    tl.store(base_ptr + target, out.to(base_ptr.dtype.element_ty), mask=(row < length)[:, None] & inside[None, :])
