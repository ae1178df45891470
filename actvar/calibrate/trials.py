"""Choose a plan by predicted times, and try it: a time that is off corrects the predictions and the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from actvar.calibrate.goal import Goal
from actvar.calibrate.plan_report import Candidate

MOST_TRIALS, TOLERANCE = 3, 0.05
"""Plans that are tried until one takes the time predicted, and by what share it may be off."""


def choose_by_trial(
    goal: Goal, curve: Sequence[Candidate], dense_seconds: float, measure: Callable[[Candidate], tuple[float, float]]
) -> tuple[bool, Candidate, float, float, float]:
    """Return whether a plan of `curve` meets the goal, the one that does so best, and what its trial gave.

    A plan whose time is not the predicted one corrects all predictions, and the choice is made again.

    Args:
        dense_seconds: of a batch of the accelerated model, when the times of the curve were measured.
        measure: returns the seconds of a batch of the accelerated model and of a plan, measured in turn.

    Returns:
        after the plan the seconds of the accelerated model, of the plan as predicted beside it, and as measured.
    """
    factor, is_met, tried = 1.0, False, []
    for _ in range(MOST_TRIALS):
        corrected = [replace(each, seconds=factor * each.seconds) if each.total else each for each in curve]
        best, is_met = goal.best(corrected, dense_seconds)
        chosen = curve[corrected.index(best)]
        if tried and chosen is tried[-1][0]:
            break
        accelerated, measured = measure(chosen)
        predicted = best.seconds / dense_seconds * accelerated
        tried.append((chosen, accelerated, predicted, measured))
        if abs(measured / predicted - 1) <= TOLERANCE:
            break
        factor *= measured / predicted
    return is_met, *tried[-1]
