"""Keep packed copies of weights: made once per tensor, kept as long as it lives and stays as it is.

PyTorch counts most changes of a tensor (`_version`). It does not count those through `.data`, by fused optimizers, by
NumPy views or by other processes. `drop_changed` finds these by a checksum of the original, so a sample begins with it.
Tensors on a GPU have no checksum, since the host would wait for it: there `drop` has to follow such a change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from actvar_kernels.cpu_backend.checksums import checksums
from actvar_kernels.situation import DIRECT, TORCH, situation

T = TypeVar("T")


class Packed(NamedTuple):
    """Hold a copy, and what its originals were like when it was made.

    Attributes:
        originals: references to the tensors.
        states: their addresses, versions and dtypes.
        checksums: of their values; none on a GPU.
        copy: what `packed` returns.
    """

    originals: tuple[weakref.ref[torch.Tensor], ...]
    states: tuple[tuple, ...]
    checksums: tuple[int, ...]
    copy: Any


_cache: dict[int, dict[Hashable, Packed]] = {}
"""Copies by the id of their first original and by their layout."""
_drops = 0


def packed(tensors: Sequence[torch.Tensor], layout: Hashable, pack: Callable[[], T]) -> T:
    """Return `pack()`, or what it returned before for the same layout if the tensors are the same and unchanged.

    A change is seen here by a tensor's version, address or dtype. `drop_changed` sees every change.

    Args:
        tensors: plain tensors that `pack` reads, of any shape and dtype; the copy is freed with the first of them.
        layout: what else the copy depends on.
        pack: makes the copy.
    """
    states = tuple(_state(tensor) for tensor in tensors)
    of_tensor = _cache.get(id(tensors[0]))
    if of_tensor is None:
        of_tensor = _cache[id(tensors[0])] = {}
        weakref.finalize(tensors[0], _cache.pop, id(tensors[0]), None)
    found = of_tensor.get(layout)
    if (
        found is None
        or found.states != states
        or any(r() is not t for r, t in zip(found.originals, tensors, strict=True))
    ):
        before = _sums(tensors)  # of what `pack` reads, so that a change on the way is found later
        found = of_tensor[layout] = Packed(tuple(map(weakref.ref, tensors)), states, before, pack())
    return found.copy


def once_on_gpu(tensors: Sequence[torch.Tensor], layout: Hashable, compute: Callable[[], T]) -> T:
    """Return `compute()`, on a GPU what it returned before for the same layout if the tensors are the same.

    Arguments are those of `packed`. Elsewhere, with gradients, and where PyTorch traces or transforms what runs, it is
    computed anew.
    """
    keeps = tensors[0].is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return packed(tensors, layout, compute) if keeps and situation(*tensors) != TORCH else compute()


def drop_changed(tensors: Iterable[torch.Tensor | None]) -> None:
    """Drop copies of those among `tensors` that differ from what was packed, by a checksum of all their values.

    Nothing is looked at while PyTorch records or transforms what runs, since no copy is used then.

    Args:
        tensors: of any shape and dtype; None stands for the weight of a layer that has none of its own.
    """
    if situation() != DIRECT:
        return
    kept: list[tuple[dict[Hashable, Packed], Hashable, Packed]] = []
    originals: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        of_tensor = _cache.get(id(tensor))
        if not of_tensor:
            continue
        for layout, found in tuple(of_tensor.items()):
            present = [original for reference in found.originals if (original := reference()) is not None]
            if tuple(map(_state, present)) != found.states:  # fewer states where an original is gone
                of_tensor.pop(layout, None)
            else:
                if found.checksums:
                    kept.append((of_tensor, layout, found))
                    originals.update((id(original), original) for original in present)
    found_sums = dict(zip(originals, checksums(list(originals.values())), strict=True))
    for of_tensor, layout, found in kept:
        if tuple(found_sums[id(reference())] for reference in found.originals) != found.checksums:
            of_tensor.pop(layout, None)


def drop(tensors: Iterable[torch.Tensor]) -> None:
    """Drop all copies of `tensors`."""
    global _drops
    _drops += 1
    for tensor in tensors:
        _cache.get(id(tensor), {}).clear()


def drops() -> int:
    """Return how often `drop` was called, which says whether copies that were read once are still those of now."""
    return _drops


def copies(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """Return all copies of `tensors`, which live as long as the list does."""
    return [found.copy for tensor in tensors for found in _cache.get(id(tensor), {}).values()]


def _sums(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return checksums of tensors on the CPU, and nothing for others."""
    return tuple(checksums(tensors)) if all(tensor.is_cpu for tensor in tensors) else ()


def _state(tensor: torch.Tensor) -> tuple:
    # tensors made in inference mode count no versions
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype
