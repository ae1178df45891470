"""Linear layers of few rows, with the norm ahead or the residual behind in one launch."""

from __future__ import annotations

import functools

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor

from actvar_kernels import BackendUnavailableError, linear_residual, norm_linear
from actvar_kernels.linear.few_rows import (
    MOST_CHANNELS,
    MOST_ROWS,
    linear_residual_reference,
    norm_linear_reference,
)
from actvar_kernels.residual_norm.reference import Gated

DTYPES = [torch.float32, torch.float16]
SHAPES = [
    (1, 1, 64, 48),
    (2, 1, 72, 33),
    (1, 7, 130, 70),
    (2, 9, 192, 100),
    (2, 25, 320, 64),
    (16, 4, 256, 96),
    (2, 4, 1024, 40),
    (1, 3, 1920, 20),
]
"""Sequences, tokens, channels, outputs."""


def normed(R: int, L: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, scale and shift as a block has them, views of one tensor, weight and bias."""
    modulation = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)
    layer = normal(D, C, seed=1, std=C**-0.5, dtype=dtype), normal(D, seed=3, dtype=dtype)
    return [normal(R, L, C, dtype=dtype), modulation[2], modulation[4], *layer]


def added(R: int, L: int, D: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, weight, bias, rows, and the gate as a block has it, a view."""
    layer = normal(C, D, seed=1, std=D**-0.5, dtype=dtype), normal(C, seed=3, dtype=dtype)
    gamma = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)[1]
    return [normal(R, L, D, dtype=dtype), *layer, normal(R, L, C, seed=5, dtype=dtype), gamma]


def residual(h: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, gamma: Tensor) -> Tensor:
    return linear_residual(h, weight, bias, Gated(rows, gamma))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_gelu", [False, True], ids=["plain", "GELU"])
def test_a_norm_ahead_of_a_layer(shape: tuple[int, ...], dtype: torch.dtype, with_gelu: bool) -> None:
    tensors = normed(*shape, dtype=dtype)
    found = norm_linear(*tensors, with_gelu=with_gelu)
    assert found.dtype == dtype
    reference = functools.partial(norm_linear_reference, with_gelu=with_gelu)
    assert_close(found, *exact_and_tolerance(reference, *tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_residual_behind_a_layer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = added(*shape, dtype=dtype)
    found = residual(*tensors)
    assert found.dtype == dtype
    assert_close(found, *exact_and_tolerance(linear_residual_reference, *tensors))
