"""Find the family of a model: every family that can be patched has a file here, and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from actvar.families.base import Family
from actvar.families.infinity import InfinityFamily
from actvar.families.infinity_public import PublicInfinityFamily
from actvar.families.var import VARFamily
from actvar.utils.wrappers import unwrapped

__all__ = ["FAMILIES", "Family", "blocks_of", "family_of"]

FAMILIES: tuple[Family, ...] = (VARFamily(), InfinityFamily(), PublicInfinityFamily())
"""Families in the order in which they are asked."""


def family_of(model: Any) -> Family:
    """Return the family of `model`, an `nn.Module` that is not inside a wrapper.

    Raises:
        TypeError: the model is of no supported family; the message lists the families, and what is missing for each.
    """
    problems = {}
    for family in FAMILIES:
        problems[family.name] = family.mismatch(model)
        if problems[family.name] is None:
            return family
    supported = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise TypeError(f"{type(model).__name__} cannot be patched. Supported: {supported}")


def blocks_of(model: Any) -> list[Any]:
    """Return the transformer blocks of `model` without wrappers; the model itself may be inside one.

    Raises:
        TypeError: the model is of no supported family.
    """
    model = unwrapped(model)
    return [unwrapped(block) for block in family_of(model).blocks(model)]
