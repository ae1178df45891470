"""Say what a plan is to reach: a speedup, a time for a batch, a divergence, or a preset's divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from actvar.models.arguments import checked_finite


class Costs(Protocol):
    """Describe what a goal reads of a plan."""

    @property
    def seconds(self) -> float:
        """Return the seconds of a batch."""
        ...

    @property
    def divergence(self) -> float:
        """Return the KL to the dense model in nats, mean over the scales that the plan changes."""
        ...

    @property
    def total(self) -> float:
        """Return the KL to the dense model in nats, summed over all scales."""
        ...


Plan = TypeVar("Plan", bound=Costs)


PRESETS = {"lossless": 0.0, "near": 0.02, "fast": 0.05, "fastest": 0.12}
"""Divergences that presets allow, as shares of the divergence of the uniform distribution at the last two scales.

On the bundled VAR `near` is what the shipped preset of that name has, which neither judge of docs/evaluation.md tells
from dense; `fast` is about what the adapter `best` has, within 1.0 of dense in FID; `fastest` is a KL of 0.5.
"""


@dataclass(frozen=True)
class Goal:
    """Hold one goal; the others are None.

    Args:
        speedup: of a whole sample with the decoder, over the accelerated dense model, from 1 on.
        budget_ms: milliseconds that a batch may take.
        kl: mean KL to the dense model's guided logits, over the scales that the plan changes, in nats.
        preset: a name of `PRESETS`, which `with_kl` turns into a KL.

    Raises:
        TypeError: a goal that is no number.
        ValueError: none or several goals, or one out of its range.
    """

    speedup: float | None = None
    budget_ms: float | None = None
    kl: float | None = None
    preset: str | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"expected one of speedup, budget_ms, kl and preset, got {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if name == "preset":
            if value not in PRESETS:
                raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {value!r:.100}")
            return
        number = checked_finite(name, value)
        least = {"speedup": 1.0, "budget_ms": 0.0, "kl": 0.0}[name]
        if number < least:
            raise ValueError(f"{name}: expected a number from {least:g} on, got {number:g}")
        object.__setattr__(self, name, number)

    def with_kl(self, uniform: float) -> Goal:
        """Return the goal with a preset's KL in place of the preset.

        Args:
            uniform: KL of the uniform distribution from the dense model's guided logits, mean of the last two scales.
        """
        return self if self.preset is None else Goal(kl=PRESETS[self.preset] * uniform)

    def best(self, plans: Sequence[Plan], accelerated: float) -> tuple[Plan, bool]:
        """Return the plan that meets the goal best, and whether it does; otherwise the nearest plan.

        Under a time, the best plan has the least total divergence. A mean would favour plans that change more scales.
        Under a divergence, it is the fastest.

        Args:
            plans: at least one.
            accelerated: seconds of a batch without a plan.
        """
        if self.kl is not None:
            met = [plan for plan in plans if plan.divergence <= self.kl]
            if met:
                return min(met, key=lambda plan: plan.seconds), True
            return min(plans, key=lambda plan: plan.divergence), False
        seconds = accelerated / self.speedup if self.speedup is not None else (self.budget_ms or 0.0) / 1e3
        met = [plan for plan in plans if plan.seconds <= seconds]
        if met:
            return min(met, key=lambda plan: (plan.total, plan.seconds)), True
        return min(plans, key=lambda plan: plan.seconds), False
