"""Allocate memory for large tensors on the CPU.

The system fills every new page with zeros at a fault. So huge pages are asked for, and a tensor takes the memory that
another one left.
"""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch

HUGE_PAGE = 2 * 2**20
KEPT = 2**30
"""Bytes that stay outside of `reused_memory`, for the next time."""

_free: list[mmap.mmap] = []
_reusing: ContextVar[bool] = ContextVar("actvar_kernels_reusing", default=False)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without values.

    From 2 MiB on the tensor lies in huge pages on Linux, where the system has them, and takes memory that another one
    left.

    Args:
        shape: sizes of the tensor.
        dtype: type of its numbers.
    """
    size = math.prod(shape) * dtype.itemsize
    if not _is_large(size):
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _taken(size) or _new(size)
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = memoryview(block)  # lives as long as the tensor's storage
    weakref.finalize(memory, _give_back, block)
    return _tensor(memory, shape, dtype)


def empty_for_long(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without values that is kept for long, such as weights, in huge pages as those of `empty`.

    With smaller pages the processor looks up hundreds of addresses for each layer at every step.

    Args:
        shape: sizes of the tensor.
        dtype: type of its numbers.
    """
    size = math.prod(shape) * dtype.itemsize
    block = _new(size) if _is_large(size) else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _tensor(memoryview(block), shape, dtype)


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep all memory that tensors leave in the context for the tensors that follow, and `KEPT` bytes after it."""
    token = _reusing.set(True)
    try:
        yield
    finally:
        _reusing.reset(token)
        release(KEPT)


def release(kept: int = 0) -> None:
    """Give memory that no tensor has back to the system, except for `kept` bytes."""
    while sum(map(len, tuple(_free))) > kept:
        try:
            _free.pop(0)
        except IndexError:  # another thread was faster
            return


def _is_large(size: int) -> bool:
    return sys.platform == "linux" and size >= HUGE_PAGE


def _new(size: int) -> mmap.mmap | None:
    """Return memory from the system, in huge pages where it has them; None where it grants no more in this way."""
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    for _ in range(2):
        try:
            block = mmap.mmap(-1, rounded, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            break
        except (OSError, OverflowError, ValueError):
            release()  # what no tensor has may be what is missing
    else:
        return None
    # Huge pages are faster, and not every kernel, sandbox or build of Python has them.
    with suppress(OSError, AttributeError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _tensor(memory: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def _give_back(block: mmap.mmap) -> None:
    if _reusing.get() or sum(map(len, tuple(_free))) + len(block) <= KEPT:
        _free.append(block)


def _taken(size: int) -> mmap.mmap | None:
    """Return the smallest free block that has at least `size` bytes and at most twice as many, or None."""
    for block in sorted(tuple(_free), key=len):
        if size <= len(block) <= 2 * size:
            try:
                _free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return None
