"""Memory for large tensors on the CPU. What comes from the system anew costs a fault per page, in which it is filled
with zeros, so huge pages are asked for, and within `reused_memory` what one tensor leaves is taken by the next."""

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
"""Bytes that stay when `reused_memory` ends, for the next time."""

_free: list[mmap.mmap] = []
_reusing: ContextVar[bool] = ContextVar("actvar_kernels_reusing", default=False)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without values; on Linux from 2 MiB on in huge pages where the system has them, and in memory that
    another one left where it is made within `reused_memory`."""
    size = math.prod(shape) * dtype.itemsize
    if not _is_large(size):
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = (_taken(size) if _reusing.get() else None) or _new(size)
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = memoryview(block)  # lives as long as the tensor's storage
    if _reusing.get():
        weakref.finalize(memory, _give_back, block)
    return _tensor(memory, shape, dtype)


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy for long, in huge pages as `empty`'s: of weights, which are read at every step. With smaller
    pages the processor looks up hundreds of addresses for each layer."""
    size = tensor.numel() * tensor.element_size()
    block = _new(size) if _is_large(size) else None
    if block is None:
        return tensor.contiguous()
    return _tensor(memoryview(block), tuple(tensor.shape), tensor.dtype).copy_(tensor)


@contextmanager
def reused_memory() -> Iterator[None]:
    """Tensors made in the context leave their memory to others that are; at its end `KEPT` bytes stay at most."""
    token = _reusing.set(True)
    try:
        yield
    finally:
        _reusing.reset(token)
        release(KEPT)


def release(kept: int = 0) -> None:
    """Give memory that no tensor has back to the system, but for `kept` bytes."""
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
    """The smallest block that has room and is no more than twice as large."""
    for block in sorted(tuple(_free), key=len):
        if size <= len(block) <= 2 * size:
            try:
                _free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    return None
