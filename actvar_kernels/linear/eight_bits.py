"""Run products in eight bits on Triton, of rows that are quantized once and may be read by several products."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import MOST_SEQUENCES
from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.linear.quantized import MOST_INPUTS, quantized_weight
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.triton_backend.row_form import ByteRows

MOST_ROWS = 16 * MOST_SEQUENCES
"""Rows that the Triton kernels take, whose smallest tiles have 16."""


def quantize_rows(x: torch.Tensor, mask: torch.Tensor | None, quantized: torch.dtype, recorded: bool) -> ByteRows:
    """Return rows in eight bits, in one launch.

    Args:
        x: `[..., C]`, float32, float16 or bfloat16.
        mask: `[..., N]` bool, which of N equal groups of columns are on, the others being zeros; None for all.
        quantized: dtype of the numbers, one of `constants.FORMATS`.
        recorded: whether the registered operator is called.
    """
    run = torch.ops.actvar_kernels.quantize_rows if recorded else _quantize
    values, scales = run(x, mask, quantized)
    return ByteRows(values, scales, x.dtype)


def multiply(rows: ByteRows, weight: torch.Tensor, bias: torch.Tensor, with_gelu: bool, recorded: bool) -> torch.Tensor:
    """Return `quantized.quantized_linear` of quantized rows, `[..., D]` in their dtype, in one launch.

    Args:
        rows: `[..., C]`.
        weight, bias: `[D, C]` and `[D]`, floating-point. A copy of the weight of one byte a number is kept.
        with_gelu: whether GELU follows, in float32.
        recorded: whether the registered operator is called.

    Raises:
        ValueError: sizes that the kernel does not take.
    """
    run = torch.ops.actvar_kernels.multiply_bytes if recorded else _multiply
    return run(*rows, weight, bias, with_gelu)


def multiply_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    residual: torch.Tensor | Residual,
    rows: ByteRows,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
    recorded: bool,
) -> None:
    """Write `residual + gamma * multiply(rows)` to `out[r, index[r, j]]`, in one launch.

    Args:
        out: `[R, L, D]`, of which rows that the index does not name are left alone.
        index: `[R, K]` int64; None for all rows.
        residual: `[R, K, D]`, or a `Residual` that gives it, whose x may be `out`.
        rows: `[R, K, C]`.
        weight, bias: as in `multiply`.
        gamma: `[R, 1, D]`, floating-point.
        recorded: whether the registered operator is called.

    Raises:
        ValueError: sizes that the kernel does not take.
    """
    x, update, gate = residual if isinstance(residual, Residual) else (residual, None, None)
    run = torch.ops.actvar_kernels.multiply_bytes_scatter if recorded else _multiply_scatter
    run(out, index, x, update, gate, rows.values, rows.scales, weight, bias, gamma)


def _byte_weight(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the kept copy of a weight `[D, C]` in eight bits and its scales `[D, 1]`; raise a ValueError as above."""
    C = values.shape[-1]
    if values.dtype == torch.int8 and C > MOST_INPUTS:
        raise ValueError(f"weight: expected at most {MOST_INPUTS} inputs in eight bits, got {C}")
    if values.numel() > C * MOST_ROWS:
        raise ValueError(f"x: expected at most {MOST_ROWS} rows in eight bits, got {values.numel() // C}")
    return packed((weight,), values.dtype, lambda: quantized_weight(weight, values.dtype))


def _quantize(x: torch.Tensor, mask: torch.Tensor | None, quantized: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    from actvar_kernels.linear import triton_kernel

    flat = None if mask is None else mask.reshape(-1, mask.shape[-1])
    values, scales = triton_kernel.quantize_rows(x.reshape(-1, x.shape[-1]), flat, quantized)
    return values.view(x.shape), scales.view(*x.shape[:-1], 1)


def _multiply(
    values: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    weight: torch.Tensor,
    bias: torch.Tensor,
    with_gelu: bool,
) -> torch.Tensor:
    from actvar_kernels.linear import triton_kernel

    copy = _byte_weight(values, weight)
    *rows, C = values.shape
    out = values.new_empty(*rows, weight.shape[0], dtype=dtype)
    flat = values.view(-1, C), scales.view(-1, 1)
    triton_kernel.multiply_bytes(out.view(1, -1, weight.shape[0]), *flat, *copy, bias, with_gelu=with_gelu)
    return out


def _multiply_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gamma: torch.Tensor,
) -> None:
    from actvar_kernels.linear import triton_kernel

    copy = _byte_weight(values, weight)
    residual = x if update is None or gate is None else Residual(x, update, gate)
    flat = values.view(-1, values.shape[-1]), scales.view(-1, 1)
    triton_kernel.multiply_bytes(out, *flat, *copy, bias, index=index, rows=residual, gamma=gamma)


_OPERATOR = "actvar_kernels::"
_quantize_operator = torch.library.custom_op(f"{_OPERATOR}quantize_rows", _quantize, mutates_args=())
_multiply_operator = torch.library.custom_op(f"{_OPERATOR}multiply_bytes", _multiply, mutates_args=())
_scatter_operator = torch.library.custom_op(
    f"{_OPERATOR}multiply_bytes_scatter", _multiply_scatter, mutates_args=("out",)
)


@_quantize_operator.register_fake
def _(x, mask, quantized):
    return x.new_empty(x.shape, dtype=quantized), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@_multiply_operator.register_fake
def _(values, scales, dtype, weight, bias, with_gelu):
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=dtype)


@_scatter_operator.register_fake
def _(*_):
    return None


def product_flops(values_shape: torch.Size, weight_shape: torch.Size) -> int:
    """Return the FLOPs of a product of rows `[..., C]` with a weight `[D, C]`, 2 a multiply-add."""
    return 2 * values_shape.numel() * weight_shape[0]


@register_flop_formula(torch.ops.actvar_kernels.multiply_bytes)
def _(values_shape, _scales, _dtype, weight_shape, *_others, **_kwargs) -> int:
    return product_flops(torch.Size(values_shape), weight_shape)


@register_flop_formula(torch.ops.actvar_kernels.multiply_bytes_scatter)
def _(_out, _index, _x, _update, _gate, values_shape, _scales, weight_shape, *_others, **_kwargs) -> int:
    return product_flops(torch.Size(values_shape), weight_shape)
