"""Inputs, and how close the kernels' results have to come to a float64 run of the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def exact_and_tolerance(
    reference: Callable[..., Tensor], *tensors: Tensor | None, times: float = 4
) -> tuple[Tensor, float]:
    """`reference(*tensors)` in float64, and `times` the largest error that the reference makes in the tensors' dtypes.

    Integer and bool tensors are passed on as they are.
    """
    exact = reference(*(t.double() if t is not None and t.is_floating_point() else t for t in tensors))
    error = (reference(*tensors).double() - exact).abs().max().item()
    return exact, times * error


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max().item()
    assert error <= tolerance, f"error {error:.3g}, allowed {tolerance:.3g}"
