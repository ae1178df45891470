"""Argument checks that several operations share."""

from __future__ import annotations

import torch


def expect_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise TypeError unless `tensor` is a tensor, ValueError unless it has `shape`; None stands for any size."""
    expect_tensor(name, tensor)
    found = tensor.shape
    if found == shape:
        return
    if len(found) == len(shape):
        for got, want in zip(found, shape, strict=True):
            if want is not None and got != want:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name}: expected shape [{wanted}], got {list(found)}")


def expect_count(name: str, count: int, most: int) -> None:
    """Raise ValueError unless `1 <= count <= most`."""
    if not 1 <= count <= most:
        raise ValueError(f"{name}: expected between 1 and {most}, got {count}")


def expect_index(index: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless `index` is an int64 tensor of `shape`. That its values name rows is not checked: that would wait for
    the device."""
    expect_shape("index", index, shape)
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected int64, got {index.dtype}")


def expect_one_device(*tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the first one's device."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected all tensors on {device}, as the first one is, got one on {tensor.device}")
