"""Residuals and modulated norms, values and gradients, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.kernel_loops import (
    EXACT,
    LOW_DTYPES,
    assert_close,
    gradients,
    leaves_of,
    looped_modulation,
    loops_in,
    normal,
    picked,
    selection_inputs,
)
from torch import Tensor

from actvar_kernels import add_normalize, add_normalize_route, normalize_modulate, route_experts

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("experts", [0, 4])
def test_add_normalize_takes_the_rows_of_the_index(experts: int) -> None:
    x, update = normal(2, 9, 64), normal(2, 5, 64, seed=1)
    gamma, scale, shift = (normal(2, 1, 64, seed=seed) for seed in (2, 3, 4))
    index = [[8, 0, 3, 5, 1], [2, 7, 6, 4, 0]]
    router = normal(experts, 64, seed=5), normal(experts, seed=6)
    if experts:
        rows, u, mask, _ = add_normalize_route(x, torch.tensor(index), update, gamma, scale, shift, *router, 3)
        assert torch.equal(mask, route_experts(u, *router, 3)[0])
    else:
        rows, u = add_normalize(x, torch.tensor(index), update, gamma, scale, shift)
    for row in range(2):
        for place, token in enumerate(index[row]):
            exact = x[row, token] + gamma[row, 0] * update[row, place]
            assert_close(rows[row, place], exact, EXACT)
            assert_close(u[row, place], oracle.modulate(exact, scale[row, 0], shift[row, 0]), EXACT)


def test_the_gradient_of_the_rows_of_an_index_goes_to_where_they_came_from() -> None:
    x, update, zeros = normal(2, 5, 6), normal(2, 3, 6, seed=1), torch.zeros(2, 1, 6, dtype=torch.float64)
    index = torch.tensor([[4, 0, 2], [1, 2, 3]])

    def rows(x: Tensor) -> Tensor:
        return add_normalize(x, index, update, zeros, zeros, zeros)[0]

    (leaf,) = leaves_of(x)
    (gradient,) = gradients(rows(leaf), [leaf])
    (expected,) = gradients(picked(leaf, index.tolist()), [leaf])
    assert torch.equal(gradient, expected)
    assert torch.autograd.gradcheck(rows, [leaf])


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("R", "L", "C"), [(1, 1, 64), (3, 19, 65), (2, 5, 128)])
def test_normalize_modulate_is_the_loops(R: int, L: int, C: int, dtype: torch.dtype) -> None:
    x, _, _, scale, shift = selection_inputs(R, L, C, dtype)
    actual = normalize_modulate(x, scale, shift)
    assert actual.dtype == dtype
    assert_close(actual, *loops_in(dtype, looped_modulation, x, scale, shift))


def test_the_gradients_of_normalize_modulate_are_those_of_the_loops() -> None:
    x, _, _, scale, shift = selection_inputs(3, 9, 64)
    leaves = leaves_of(x, scale, shift)
    actual = gradients(normalize_modulate(*leaves), leaves)

    def loops(*tensors: Tensor) -> list[Tensor]:
        leaves = leaves_of(*tensors)
        return gradients(looped_modulation(*leaves), leaves)

    for part, gradient in enumerate(actual):
        exact, tolerance = loops_in(torch.float32, lambda *t, part=part: loops(*t)[part], x, scale, shift)
        assert_close(gradient, exact, tolerance)
