"""Normalised and rotated heads on Triton against float64."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor

from actvar_kernels import BackendUnavailableError, rotate_heads
from actvar_kernels.rotary import reference

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1, 9, 4), (2, 3, 37, 32), (1, 2, 65, 128)]
"""Rows, heads, tokens, size of a head."""


def inputs(R: int, H: int, K: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries as a view of a projection, angles of K + 3 tokens, an index, and a scale by head."""
    x = normal(R, K, 3, H, d, dtype=dtype)[:, :, 1].transpose(1, 2)
    angle = normal(K + 3, d // 2, seed=1, std=3.0)
    angles = torch.stack((angle.cos(), angle.sin())).float()
    index = torch.stack([torch.randperm(K + 3, generator=torch.Generator().manual_seed(row))[:K] for row in range(R)])
    return [x, angles, index.sort(1).values, normal(H, seed=2).exp().float()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_an_index_are_scaled_and_rotated(shape: tuple[int, ...], dtype: torch.dtype, grid_order: str) -> None:
    arguments = inputs(*shape, dtype)
    out = rotate_heads(*arguments)
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    assert_close(out, *exact_and_tolerance(reference.rotate_heads, *arguments))


def test_without_index_and_scale_all_tokens_keep_a_norm_of_one() -> None:
    x, angles, _, _ = inputs(2, 3, 9, 16)
    out = rotate_heads(x, angles[:, :9])
    assert_close(out, *exact_and_tolerance(reference.rotate_heads, x, angles[:, :9]))
    assert_close(out.norm(dim=-1), torch.ones(2, 3, 9, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("shape", [(0, 1, 3, 8), (1, 0, 3, 8), (1, 1, 0, 8)], ids=["sequences", "heads", "rows"])
def test_nothing_comes_of_nothing(shape: tuple[int, ...]) -> None:
    R, H, K, d = shape
    index = torch.zeros(R, K, dtype=torch.int64)
    assert rotate_heads(torch.ones(shape), torch.ones(2, 3, d // 2), index, torch.ones(H)).shape == shape


def test_a_row_of_zeros_stays_zero() -> None:
    x, *others = inputs(1, 1, 3, 8)
    x = torch.cat((x[:, :, :1] * 0, x[:, :, 1:]), dim=2)
    assert torch.equal(rotate_heads(x, *others)[:, :, 0], torch.zeros(1, 1, 8))


def test_gradients_are_those_of_the_reference() -> None:
    x, angles, index, scale = inputs(1, 2, 5, 8)
    found = []
    for function in (rotate_heads, reference.rotate_heads):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        (function(leaves[0], angles, index, leaves[1]) * normal(*x.shape, seed=3).float()).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *found))


def test_other_heads_are_refused_by_name() -> None:
    x, angles, index, scale = inputs(1, 1, 3, 6)
    with pytest.raises(BackendUnavailableError, match=r"rotate_heads .*heads of 4, 8, 16, 32, 64, 128, 256"):
        rotate_heads(x, angles, index, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(1, 1, 3, 5)), "an even number of channels, got 5"),
        (dict(angles=torch.ones(2, 6, 3)), "angles"),
        (dict(index=torch.zeros(1, 2, dtype=torch.int64)), "index"),
        (dict(scale=torch.ones(2)), "scale"),
    ],
    ids=["odd", "angles", "index", "scale"],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = dict(zip(("x", "angles", "index", "scale"), inputs(1, 1, 3, 8), strict=True))
    with pytest.raises(ValueError, match=message):
        rotate_heads(**arguments | change)
