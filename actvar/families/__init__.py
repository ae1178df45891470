"""Model families that can be patched: one file each, and one line in `FAMILIES`."""

from __future__ import annotations

from torch import nn

from actvar.families.base import Family
from actvar.families.var import VARFamily
from actvar.utils.wrappers import unwrapped

__all__ = ["FAMILIES", "Family", "blocks_of", "family_of"]

FAMILIES: tuple[Family, ...] = (VARFamily(),)
"""Families in the order in which they are asked."""


def family_of(model: nn.Module) -> Family:
    """Return the family of `model`, which must not be inside a wrapper.

    Raises:
        TypeError: the model is of no supported family; lists those there are, and what is missing.
    """
    problems = {}
    for family in FAMILIES:
        problems[family.name] = family.mismatch(model)
        if problems[family.name] is None:
            return family
    supported = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise TypeError(f"{type(model).__name__} cannot be patched. Supported: {supported}")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of `model`, which may be inside a wrapper, outside of wrappers.

    Raises:
        TypeError: the model is of no supported family.
    """
    model = unwrapped(model)
    return [unwrapped(block) for block in family_of(model).blocks(model)]
