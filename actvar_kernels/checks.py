"""Check arguments of operations."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch


def expect_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def expect_shape(name: str, tensor: Any, shape: tuple[int | None, ...]) -> torch.Size:
    """Return the shape of a tensor; raise TypeError unless it is a tensor, ValueError unless it has `shape`.

    In `shape` None stands for any size.
    """
    if not isinstance(tensor, torch.Tensor):
        expect_tensor(name, tensor)
    found = tensor.shape
    if found == shape:
        return found
    if len(found) == len(shape):
        for got, want in zip(found, shape, strict=True):
            if want is not None and got != want:
                break
        else:
            return found
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name}: expected shape [{wanted}], got {list(found)}")


def expect_count(name: str, count: int, most: int) -> int:
    """Return `count` as an int; raise TypeError unless it is an integer, ValueError unless `1 <= count <= most`."""
    count = as_integer(name, count)
    if not 1 <= count <= most:
        raise ValueError(f"{name}: expected between 1 and {most}, got {count}")
    return count


def as_integer(name: str, value: object, wanted: str = "an integer") -> int:
    """Return an integer of any kind as an int: Python's, numpy's, or an array or tensor without dimensions.

    Args:
        name: the argument, for the error.
        value: what may be an integer; a bool is none.
        wanted: what the error says that was expected.

    Raises:
        TypeError: `value` is no integer.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # pyright: ignore[reportReturnType] a SymInt is an int while PyTorch traces
    number = _unwrapped(value)
    if isinstance(number, bool | np.bool_) or not isinstance(number, Integral):
        raise TypeError(f"{name}: expected {wanted}, got {value!r:.100}")
    return int(number)


def as_number(name: str, value: object, wanted: str = "a number") -> float:
    """Return a real number of any kind as a float: Python's, numpy's, or an array or tensor without dimensions.

    Args:
        name: the argument, for the error.
        value: what may be a real number; a bool is none.
        wanted: what the error says that was expected.

    Raises:
        TypeError: `value` is no real number.
        ValueError: `value` is too large for a float.
    """
    if type(value) is float or isinstance(value, torch.SymFloat | torch.SymInt):
        return value  # pyright: ignore[reportReturnType] as in `as_integer`
    number = _unwrapped(value)
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real):
        raise TypeError(f"{name}: expected {wanted}, got {value!r:.100}")
    try:
        return float(number)
    except OverflowError as error:
        raise ValueError(f"{name}: expected {wanted}, got one that is too large for a float") from error


def as_items(value: Any) -> tuple | None:
    """Return the items of a sequence, or of an array or tensor with a dimension; None where `value` is neither.

    A string is no sequence here.
    """
    is_array = isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 0
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(value) if is_array or is_sequence else None


def _unwrapped(value: Any) -> Any:
    """Return the number in an array or tensor without dimensions, and anything else as it is."""
    return value.item() if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0 else value


def expect_index(index: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise unless `index` is an int64 tensor of `shape`.

    The values are not checked, since that would wait for the device.
    """
    expect_shape("index", index, shape)
    if index.dtype != torch.int64:
        raise TypeError(f"index: expected int64, got {index.dtype}")


def expect_one_device(*tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the first one's device."""
    device = tensors[0].device  # pyright: ignore[reportOptionalMemberAccess] only others may be None
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected all tensors on {device}, as the first one is, got one on {tensor.device}")
