"""Multiply a matrix with the weights of several layers in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from actvar_kernels.linear.tiles import layer_tiles
from actvar_kernels.triton_backend.products import add_product, load_columns, row_pointers
from actvar_kernels.triton_backend.tiles import architecture


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what `linears.reference` does, with sums in float32.

    Args:
        x: `[R, C]`, float32, float16 or bfloat16.
        weights, biases: N layers, `[D, C]` and `[D]` each, in x's dtype.
    """
    (R, C), N, D = x.shape, len(weights), weights[0].shape[0]
    out = x.new_empty(N, R, D)
    rows, product = layer_tiles(architecture(x), x.dtype, R)
    _linears[(triton.cdiv(D, product.columns), N, triton.cdiv(R, rows))](
        x.contiguous(),
        tuple(weight.contiguous() for weight in weights),
        tuple(bias.contiguous() for bias in biases),
        out,
        R,
        LAYERS=N,
        C=C,
        D=D,
        BLOCK_R=rows,
        BLOCK_D=product.columns,
        BLOCK_C=product.depth,
        num_warps=product.warps,
        num_stages=product.stages,
    )
    return out


@triton.jit(do_not_specialize=["R"])
def _linears(
    x_ptr,
    weights,
    biases,
    out_ptr,
    R,
    LAYERS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiply a tile of rows with some columns of one layer."""
    layer = tl.program_id(1)
    weight_ptr, bias_ptr = weights[0], biases[0]
    for other in tl.static_range(1, LAYERS):  # pyright: ignore[reportGeneralTypeIssues] it is compiled
        weight_ptr = tl.where(layer == other, weights[other], weight_ptr)
        bias_ptr = tl.where(layer == other, biases[other], bias_ptr)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = row_pointers(x_ptr, tl.minimum(row, R - 1), C, BLOCK_C)
    columns = row_pointers(weight_ptr, tl.minimum(column, D - 1), C, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for k in range(0, C, BLOCK_C):
        sums = add_product(sums, load_columns(rows, k, C, BLOCK_C), load_columns(columns, k, C, BLOCK_C))
    sums += tl.load(bias_ptr + tl.minimum(column, D - 1)).to(tl.float32)[None, :]
    place = out_ptr + (layer.to(tl.int64) * R + row)[:, None] * D + column[None, :]
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=(row < R)[:, None] & (column < D)[None, :])
