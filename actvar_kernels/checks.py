"""Argument checks that several operations share."""

from __future__ import annotations

import torch


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; None stands for any size."""
    matches = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def expect_count(name: str, count: int, most: int) -> None:
    """Raise ValueError unless `1 <= count <= most`."""
    if not 1 <= count <= most:
        raise ValueError(f"{name}: expected between 1 and {most}, got {count}")
