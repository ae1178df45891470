"""Packed copies of weights, made once per tensor and kept as long as it lives and stays as it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

_cache: dict[tuple[int, Hashable], tuple[tuple, object]] = {}


def packed(tensors: Sequence[torch.Tensor], layout: Hashable, pack: Callable[[], T]) -> T:
    """`pack()`, or what it returned before for the same layout if the tensors are the same and unchanged.

    Args:
        tensors: what `pack` reads; the copy is freed with the first of them.
    """
    key = id(tensors[0]), layout
    # tensors made in inference mode count no versions
    state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)
    found = _cache.get(key)
    if found is None or found[0] != state:
        if found is None:
            weakref.finalize(tensors[0], _cache.pop, key, None)
        found = _cache[key] = state, pack()
    return found[1]


def outdate(tensors: Iterable[torch.Tensor]) -> None:
    """Have copies made anew of tensors that are about to be changed, since those made in inference mode do not tell."""
    changed = {id(tensor) for tensor in tensors}
    for key in [key for key in _cache if key[0] in changed]:
        _cache[key] = (), None
