"""Multiply tiles of matrices in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_pointers(ptr, row, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to the first `BLOCK` elements of rows of a matrix."""
    return ptr + row.to(tl.int64)[:, None] * STRIDE + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_columns(rows, k, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return `BLOCK` elements from the k-th on of rows that are `LENGTH` long, zero from there on."""
    if LENGTH % BLOCK == 0:
        return tl.load(rows + k)
    else:
        return tl.load(rows + k, mask=(k + tl.arange(0, BLOCK) < LENGTH)[None, :], other=0.0)


@triton.jit
def add_product(acc, a, b):
    """Return `acc + a b^T`, of int8 in int32.

    In float32 the product is summed by itself first. So the error grows with the number of steps, not with that of the
    terms. So it is for float8e4nv on sm_90, whose tensor cores sum with fewer bits than float32 has.
    """
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b.T, input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        return tl.dot(a, b.T, acc, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b.T, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def gelu(x):
    """Return `gelu_tanh(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`, in float32."""
    # rsqrt(a)^2 is 1 / a in fewer instructions
    root = tl.rsqrt(1 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x)))
    return x * root * root


@triton.jit
def store_product(
    acc,
    row,
    inside,
    channel,
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
    C: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store a tile of a product of the rows `row` of all sequences, after bias and residual, where there are any.

    A row goes to its place by the index, if there is one. Without `rows_ptr` there is no residual. With `update_ptr`
    the residual is `rows + gate * update`.
    """
    sequence, slot = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    token = slot
    if index_ptr is not None:
        token = tl.load(index_ptr + row, mask=inside, other=0).to(tl.int64)
    out_rows = out_ptr + sequence * out_strides[0] + token * out_strides[1]
    if rows_ptr is None:
        residual, update, gate, gamma = None, None, None, None
    else:
        gamma = gamma_ptr + sequence * gamma_stride
        if update_ptr is None:
            residual, update, gate = rows_ptr + sequence * rows_strides[0] + slot * rows_strides[1], None, None
        else:
            residual = rows_ptr + sequence * rows_strides[0] + token * rows_strides[1]
            update, gate = update_ptr + row.to(tl.int64) * C, gate_ptr + sequence * gate_stride
    _store_rows(out_rows, acc, channel, bias_ptr, residual, update, gate, gamma, inside, C, PARTS)


@triton.jit
def _store_rows(
    out_rows, acc, channel, bias_ptr, residual, update, gate, gamma, inside, C: tl.constexpr, PARTS: tl.constexpr
):
    """Add bias and residual, where there are any, to rows given by pointers, and store them.

    This is done in `PARTS` parts, one after the other, which takes fewer registers.
    """
    if PARTS > 1:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        rows = (bias_ptr, residual, update, gate, gamma, inside)
        _store_rows(out_rows, left, channel, *rows, C, PARTS // 2)
        _store_rows(out_rows, right, channel + half, *rows, C, PARTS // 2)
    else:
        channels = channel + tl.arange(0, acc.shape[1])
        valid = inside[:, None] & (channels < C)[None, :]
        y = acc
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            before = tl.load(residual[:, None] + channels[None, :], mask=valid, other=0.0)
            if update is not None:
                g = tl.load(gate[:, None] + channels[None, :], mask=valid, other=0.0).to(tl.float32)
                added = tl.load(update[:, None] + channels[None, :], mask=valid, other=0.0).to(tl.float32)
                before = (before.to(tl.float32) + g * added).to(before.dtype)
            g = tl.load(gamma[:, None] + channels[None, :], mask=valid, other=0.0).to(tl.float32)
            y = before.to(tl.float32) + g * y
        tl.store(out_rows[:, None] + channels[None, :], y.to(out_rows.dtype.element_ty), mask=valid)
