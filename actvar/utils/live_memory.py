"""Add up the bytes of the tensors that are in memory while a model runs, also of tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def peak_live_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors made by `run` that are alive at once; meta tensors count as real ones.

    Memory inside operators is not counted.
    """
    with _LiveBytes() as live:
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Keep the bytes of the storages that operators make until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operator, and note the storages of its results that it did not get."""
        self._note((args, kwargs), counts=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, counts=True)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, values: Any, counts: bool) -> None:
        """Know the storages of tensors until they are freed, when their addresses may be given to others."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                size = storage.nbytes() if counts else 0
                self.known.add(storage._cdata)
                self.now += size
                weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size
