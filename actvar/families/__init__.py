"""Model families that can be patched. A family answers: which blocks, where the K/V cache, how the FFN splits."""

from __future__ import annotations

from torch import nn

from actvar.families import var

FAMILIES = (var,)


def family_of(model: nn.Module):
    """The family module of `model`.

    Raises:
        TypeError: no family supports it; says what each one expects and what is missing.
    """
    problems = []
    for family in FAMILIES:
        problem = family.mismatch(model)
        if problem is None:
            return family
        problems.append(f"{family.NAME}: {problem}")
    raise TypeError(f"{type(model).__name__} cannot be patched. Supported: " + "; ".join(problems))
