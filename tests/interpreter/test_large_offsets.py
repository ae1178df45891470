"""Offsets above 2^31 on Triton: sequences that lie far apart in a file of holes give what neighbouring ones give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comparison import normal
from torch import Tensor

import actvar_kernels as ops
from actvar_kernels.backend import MOST_SEQUENCES

DISTANCE = 2**30 + 64
"""Between sequences, in elements: the third begins above 2^31."""
R, L, C, KEEP, N = 3, 5, 16, 3, 4
Far = Callable[[Tensor], Tensor]


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Far]:
    """Copies a tensor `[R, ...]` to where its rows are `DISTANCE` apart; memory is taken for what is written only."""
    kept = []

    def spread(tensor: Tensor) -> Tensor:
        size = DISTANCE * (len(tensor) - 1) + tensor[0].numel()
        path = tmp_path / str(len(kept))
        memory = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
        path.unlink()
        strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(1, tensor.dim())]
        view = memory.as_strided(tensor.shape, (DISTANCE, *strides))
        kept.append(memory)
        return view.copy_(tensor)

    yield spread
    kept.clear()


def half(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.float16)


def index() -> Tensor:
    return normal(R, L, seed=9).argsort(dim=1)[:, :KEEP].sort(dim=1).values


def gamma() -> Tensor:
    return half(R, 1, C, seed=3)


def select(x: Tensor, in_place: bool) -> tuple[Tensor, ...]:
    found = ops.select_tokens(x, half(1, C, seed=1), half(1, seed=2), gamma(), gamma(), KEEP, in_place=in_place)
    return found.index, found.modulated, found.scores


def experts(rest: Tensor, schedule: str, deferred: bool = False) -> Tensor:
    rows, mask = half(R, KEEP, C, seed=5), normal(R, KEEP, N, seed=6) > 0
    weights = half(4 * C, C, seed=7), half(4 * C, seed=8), half(C, 4 * C, seed=9), half(C, seed=10)
    before = ops.Residual(rest, rows, gamma()) if deferred else rows
    return ops.expert_ffn_scatter(rest, index(), before, rows, mask, 2, *weights, gamma(), schedule)


def attention(keys: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (half(R, 1, KEEP, C, seed=seed) for seed in range(3))
    past = keys[:, :, :2], keys[:, :, :2]
    return ops.subset_attention(q, k, v, past, half(1).abs() + 1, 1.0, room=(keys, keys.clone()))[:2]


OPERATIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]] = {
    "select_tokens": ((R, L, C), lambda x: select(x, in_place=False)),
    "select_tokens in place": ((R, L, C), lambda x: select(x, in_place=True)),
    "normalize_modulate": ((R, L, C), lambda x: ops.normalize_modulate(x, gamma(), gamma())),
    "modulation": ((R, 1, C), lambda scale: ops.normalize_modulate(half(R, L, C), scale, scale)),
    "add_normalize": ((R, L, C), lambda x: ops.add_normalize(x, index(), half(R, KEEP, C), *(gamma(),) * 3)),
    "add_normalize of all": ((R, L, C), lambda x: ops.add_normalize(half(R, L, C), None, x, *(gamma(),) * 3)),
    "add_normalize_route": (
        (R, L, C),
        lambda x: tuple(
            ops.add_normalize_route(x, index(), half(R, KEEP, C), *(gamma(),) * 3, half(N, C), half(N, seed=1), 2)
        ),
    ),
    "expert_ffn_scatter": ((R, L, C), lambda rest: experts(rest, "dense")),
    "expert_ffn_scatter, sorted": ((R, L, C), lambda rest: experts(rest, "tile_list")),
    "expert_ffn_scatter of a deferred sum": ((R, L, C), lambda x: experts(x, "tile_list", deferred=True)),
    "scatter_rows": (
        (R, L, C),
        lambda rest: ops.scatter_rows(rest, index(), half(R, KEEP, C, seed=1), half(R, KEEP, C, seed=2), gamma()),
    ),
    "subset_attention": ((R, 1, 2 + KEEP, C), attention),
    "group_norm_silu": (
        (R, 2, 3, C),
        lambda x: ops.group_norm_silu(x.permute(0, 3, 1, 2), half(C, seed=1), half(C, seed=2), 4, 1e-6),
    ),
    "add_residual": ((R, 2, 3, C), lambda x: ops.add_residual(x.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), half(C))),
    "sample_tokens": ((4, L, 8), lambda logits: ops.sample_tokens(logits, 1.0, 4, 0.9, seed=0)),
    "sample_tokens with noise": (
        (3, L, 8),
        lambda noise: ops.sample_tokens(half(6, L, 8), 1.0, 4, 0.9, noise=noise),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_sequences_that_lie_far_apart_give_what_neighbours_give(name: str, far: Far) -> None:
    shape, operation = OPERATIONS[name]
    tensor = half(*shape, seed=4)
    with torch.no_grad():
        expected, found = operation(tensor.clone()), operation(far(tensor))
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        assert torch.equal(one, other)


def _tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("R", [MOST_SEQUENCES + 1])
def test_more_sequences_than_a_grid_has_programs_are_refused_by_name(R: int) -> None:
    x, gamma = torch.zeros(R, 1, 4), torch.zeros(R, 1, 4)
    rows = torch.zeros(R, 1, dtype=torch.int64)
    for run in (
        lambda: ops.normalize_modulate(x, gamma, gamma),
        lambda: ops.add_normalize(x, None, x, gamma, gamma, gamma),
        lambda: ops.select_tokens(x, gamma[0], gamma[0, 0, :1], gamma, gamma, 1),
        lambda: ops.scatter_rows(x, rows, x, x, gamma),
    ):
        with pytest.raises(ops.BackendUnavailableError, match=f"up to .*{MOST_SEQUENCES} sequences"):
            run()
    image, vector = torch.zeros(R, 4, 1, 1), torch.zeros(4)
    for run in (
        lambda: ops.group_norm_silu(image, vector, vector, 4, 1e-6),
        lambda: ops.add_residual(image, image, vector),
    ):
        with pytest.raises(ops.BackendUnavailableError, match=f"up to {MOST_SEQUENCES} images"):
            run()
