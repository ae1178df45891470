"""Model families that can be patched. A family answers: which blocks, where the K/V cache, how the FFN splits."""

from __future__ import annotations

from types import ModuleType

from torch import nn

from actvar.families import var
from actvar.utils.wrappers import unwrapped

__all__ = ["family_of", "family_of_patched", "unwrapped"]


def family_of(model: nn.Module) -> ModuleType:
    """The family module of `model`.

    Raises:
        TypeError: it is of no supported family; lists those there are, and what is missing.
    """
    problem = var.mismatch(model)
    if problem is not None:
        raise TypeError(f"{type(model).__name__} cannot be patched. Supported: {var.NAME}: {problem}")
    return var


def family_of_patched(_model: nn.Module) -> ModuleType:
    """The family of a model that `family_of` has taken before, which is not looked at again: every step asks."""
    return var
