"""Multiply matrices of numbers in eight bits by Triton, and quantize rows to them."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.linear.tiles import product_tiles, quantizing_tiles
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.triton_backend import tiles
from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.products import add_product, gelu, load_columns, row_pointers, store_product
from actvar_kernels.triton_backend.rows import row_bytes


def quantize_rows(
    x: torch.Tensor, mask: torch.Tensor | None, quantized: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantized.quantize` does, after zeros where the mask is.

    Args:
        x: `[T, C]`, float32, float16 or bfloat16.
        mask: `[T, N]` bool, which of N equal groups of columns are on; None for all.
        quantized: int8 or float8_e4m3fn.

    Returns:
        `[T, C]` in that dtype and `[T, 1]` float32.
    """
    T, C = x.shape
    x, N = x.contiguous(), 1 if mask is None else mask.shape[1]
    values, scales = x.new_empty(T, C, dtype=quantized), x.new_empty(T, 1, dtype=torch.float32)
    tile = quantizing_tiles(T, C)
    _quantize_rows[(triton.cdiv(T, tile.rows),)](
        x,
        None if mask is None else mask.contiguous().view(torch.uint8),
        values,
        scales,
        T,
        C=C,
        EXPERTS=N,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tile.rows,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **early_launch(x),
    )
    return values, scales


def multiply_bytes(
    out: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    *,
    with_gelu: bool = False,
    index: torch.Tensor | None = None,
    rows: torch.Tensor | Residual | None = None,
    gamma: torch.Tensor | None = None,
) -> None:
    """Write the product of quantized rows and a quantized weight to `out`, as `quantized.quantized_product` has it.

    Args:
        out: `[R, L, D]`, floating-point, any strides with contiguous channels.
        values, scales: rows `[R * K, C]`, int8 or float8_e4m3fn, and `[R * K, 1]` float32.
        weight, weight_scales: `[D, C]` in the dtype of `values`, and `[D, 1]` float32.
        bias: `[D]`, floating-point.
        with_gelu: whether GELU follows.
        index: `[R, K]` int64, the rows of `out` that are written; None for all, K = L.
        rows: `[R, K, D]`, or a `Residual` that gives them, to which `gamma` times the product is added; or None.
        gamma: `[R, 1, D]`, floating-point, where there are `rows`.
    """
    rows, update, gate = rows if isinstance(rows, Residual) else (rows, None, None)
    update = None if update is None else update.contiguous()
    rows, gamma, gate = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (rows, gamma, gate))
    (T, C), D = values.shape, weight.shape[0]
    tokens = out.shape[1] if index is None else index.shape[1]
    tile = product_tiles(tiles.architecture(values), T, D, tiles.multiprocessors(values))
    product = tile.product
    _multiply_bytes[(triton.cdiv(D, product.columns), triton.cdiv(T, tile.rows))](
        values,
        scales,
        weight,
        weight_scales,
        bias,
        rows,
        update,
        gate,
        gamma,
        None if index is None else index.contiguous(),
        out,
        (0, 0) if rows is None else rows.stride()[:2],
        1 if gate is None else gate.stride(0),
        1 if gamma is None else gamma.stride(0),
        out.stride()[:2],
        tokens,
        T,
        C=C,
        D=D,
        GELU=with_gelu,
        BLOCK_T=tile.rows,
        BLOCK_D=product.columns,
        BLOCK_C=product.depth,
        PARTS=tile.parts,
        num_warps=product.warps,
        num_stages=product.stages,
        enable_fp_fusion=False,
        **early_launch(values),
    )


@triton.jit(do_not_specialize=["T"])
def _quantize_rows(
    x_ptr,
    mask_ptr,
    values_ptr,
    scales_ptr,
    T,
    C: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantize `ROWS` rows, of which groups of channels are left out."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    written = (row < T)[:, None] & (channel < C)[None, :]
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + offset, mask=written, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        group = tl.minimum(channel, C - 1) // (C // EXPERTS)
        on = tl.load(mask_ptr + row.to(tl.int64)[:, None] * EXPERTS + group[None, :], mask=written, other=0)
        x = tl.where(on != 0, x, 0.0)
    values, scale = row_bytes(x, values_ptr)  # pyright: ignore[reportGeneralTypeIssues] what is compiled returns
    tl.store(values_ptr + offset, values, mask=written)
    tl.store(scales_ptr + row, scale, mask=row < T)


@triton.jit(do_not_specialize=["tokens", "T"])
def _multiply_bytes(
    values_ptr,
    scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    rows_ptr,
    update_ptr,
    gate_ptr,
    gamma_ptr,
    index_ptr,
    out_ptr,
    rows_strides,
    gate_stride,
    gamma_stride,
    out_strides,
    tokens,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply a tile of rows with some columns of the weight; sums of int8 are exact in int32."""
    begin(PDL)
    first = tl.program_id(0) * BLOCK_D
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.minimum(first + tl.arange(0, BLOCK_D), D - 1)
    rows = row_pointers(values_ptr, tl.minimum(row, T - 1), C, BLOCK_C)
    columns = row_pointers(weight_ptr, column, C, BLOCK_C)
    SUMS: tl.constexpr = tl.int32 if values_ptr.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros((BLOCK_T, BLOCK_D), SUMS)
    for k in range(0, C, BLOCK_C):
        sums = add_product(sums, load_columns(rows, k, C, BLOCK_C), load_columns(columns, k, C, BLOCK_C))
    row_scale = tl.load(scales_ptr + tl.minimum(row, T - 1))
    y = sums.to(tl.float32) * tl.load(weight_scales_ptr + column)[None, :] * row_scale[:, None]
    y += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    if GELU:
        y = gelu(y)
    places = (rows_ptr, update_ptr, gate_ptr, gamma_ptr, index_ptr, out_ptr)
    strides = (rows_strides, gate_stride, gamma_stride, out_strides)
    store_product(y, row, row < T, first, None, *places, *strides, tokens, D, PARTS)
