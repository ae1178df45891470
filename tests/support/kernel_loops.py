"""Compare operations with loops in float64, and derive the tolerances from the loops.

Where an operation works in float64 throughout, it is held to 1e-12. Elsewhere the tolerance is four times the error of
the loops themselves when they run in the lower precision (`loops_in`): the order of a sum is not the same there, and a
few numbers do not show its largest error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from support import oracle

LOW_DTYPES = [torch.bfloat16, torch.float16]
EXACT = 1e-12
SHAPES = [(1, 1, 64, 1), (2, 16, 128, 12), (3, 25, 65, 19), (2, 7, 5, 1), (4, 9, 192, 9)]
"""Rows, tokens, width, kept tokens."""


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops_in(dtype: torch.dtype, loops: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, float]:
    """Return the loops' result in float64, and four times the error they have in `dtype`; `tensors` are in `dtype`."""
    exact = loops(*(None if t is None else t.double() for t in tensors))
    rough = loops(*(None if t is None else t.to(dtype) for t in tensors))
    return exact, 4 * (rough.double() - exact).abs().max().item()


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max().item()
    assert error <= tolerance, f"error {error:.3g}, allowed {tolerance:.3g}"


def gradients(output: Tensor, leaves: list[Tensor], seed: int = 99) -> list[Tensor]:
    """Return the gradients of the output weighted by fixed random numbers."""
    weights = normal(*output.shape, seed=seed).to(output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(True) for tensor in tensors]


def looped_modulation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([oracle.modulate(token, scale[row, 0], shift[row, 0]) for token in x[row]])
            for row in range(x.shape[0])
        ]
    )


def picked(x: Tensor, index: list[list[int]]) -> Tensor:
    return torch.stack([torch.stack([x[row, i] for i in kept]) for row, kept in enumerate(index)])


def selection_inputs(R: int, L: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return x, weight, bias, scale and shift."""
    shapes = [(R, L, C), (1, C), (1,), (R, 1, C), (R, 1, C)]
    return [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def looped_scatter(x: Tensor, index: list[list[int]], rows: Tensor, update: Tensor, gamma: Tensor) -> Tensor:
    out = [list(row) for row in x]
    for row, kept in enumerate(index):
        for position, token in enumerate(kept):
            out[row][token] = rows[row, position] + gamma[row, 0] * update[row, position]
    return torch.stack([torch.stack(row) for row in out])


def scatter_inputs(R: int, L: int, C: int, keep: int, dtype: torch.dtype) -> tuple[list[Tensor], list[list[int]]]:
    """Return x, rows, update and gamma; and the index."""
    shapes = [(R, L, C), (R, keep, C), (R, keep, C), (R, 1, C)]
    tensors = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    return tensors, normal(R, L, seed=9).argsort(dim=1)[:, :keep].tolist()
