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
    """Return `acc + a b^T`.

    In float32 the product is summed by itself first. So the error grows with the number of steps, not with that of the
    terms.
    """
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b.T, input_precision="ieee")
    else:
        return tl.dot(a, b.T, acc, input_precision="ieee")
