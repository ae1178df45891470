"""Kept rows back in their places, values and gradients, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from support.kernel_loops import (
    EXACT,
    LOW_DTYPES,
    SHAPES,
    assert_close,
    gradients,
    leaves_of,
    looped_scatter,
    loops_in,
    scatter_inputs,
)
from torch import Tensor

from actvar_kernels import scatter_rows

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_scatter_rows_updates_the_kept_rows_of_a_copy(R: int, L: int, C: int, keep: int, dtype: torch.dtype) -> None:
    (x, rows, update, gamma), index = scatter_inputs(R, L, C, keep, dtype)
    before = x.clone()
    out = scatter_rows(x, torch.tensor(index), rows, update, gamma)
    assert torch.equal(x, before)
    assert out.dtype == dtype
    exact, tolerance = loops_in(dtype, lambda *t: looped_scatter(t[0], index, *t[1:]), x, rows, update, gamma)
    assert_close(out, exact, EXACT if dtype == torch.float64 else tolerance)
    untouched = torch.ones(R, L, dtype=torch.bool).scatter_(1, torch.tensor(index), False)
    assert torch.equal(out[untouched], x[untouched])


def test_the_gradients_of_scatter_rows_are_those_of_the_loops() -> None:
    tensors, index = scatter_inputs(2, 5, 4, 3, torch.float64)

    def scatter(x: Tensor, rows: Tensor, update: Tensor, gamma: Tensor) -> Tensor:
        return scatter_rows(x, torch.tensor(index), rows, update, gamma)

    leaves = leaves_of(*tensors)
    actual, expected = (
        gradients(output, leaves) for output in (scatter(*leaves), looped_scatter(leaves[0], index, *leaves[1:]))
    )
    for gradient, exact in zip(actual, expected, strict=True):
        assert_close(gradient, exact, EXACT)
    assert torch.autograd.gradcheck(scatter, leaves)
