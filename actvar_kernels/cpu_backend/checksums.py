"""Compute checksums of tensors in C++, at the speed of memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from actvar_kernels.cpu_backend import cpu


def checksums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return a checksum of the values of each tensor, in their order.

    A change of one number always changes it, and any other change with a probability of 1 - 2^-64 or so.

    Args:
        tensors: plain CPU tensors; one with gaps is copied first.
    """
    if not tensors:
        return []
    count = len(tensors)
    tensors = [tensor.detach().contiguous() for tensor in tensors]
    pointers = (ctypes.c_void_p * count)(*[tensor.data_ptr() for tensor in tensors])
    sizes = (ctypes.c_int64 * count)(*[tensor.nbytes for tensor in tensors])
    found = (ctypes.c_uint64 * count)()
    _library().checksums(count, pointers, sizes, found, torch.get_num_threads())
    return list(found)


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    pointer = ctypes.c_void_p
    library.checksums.argtypes = [ctypes.c_int, pointer, pointer, pointer, ctypes.c_int]
    library.checksums.restype = None
    return library
