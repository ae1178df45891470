"""Measure the seconds of every scale of a sample by tokens, experts and guidance, and predict those of a plan."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families import family_of
from actvar.families.conditions import Conditions
from actvar.patching.patch import reconfigure
from actvar.sampling.timing import interleaved_seconds, step_seconds
from actvar.sparse.schedule import build_schedule
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped

SHARES = (1.0, 0.75, 0.5)
"""Shares of tokens and of experts that are timed; between them times are interpolated, and below extrapolated."""
MOST_SECONDS = 240.0
"""Seconds after which no further turn of samples would end."""


class ScaleTimes(NamedTuple):
    """Hold the seconds of one scale by what is computed there, for all blocks alike.

    Args:
        by_tokens: seconds by `SHARES` of the tokens, with all experts on.
        by_experts: seconds by `SHARES` of the experts that routers choose, with all tokens.
        by_static: the same of static experts.
    """

    by_tokens: Sequence[float]
    by_experts: Sequence[float]
    by_static: Sequence[float]

    def at(self, tokens: float, experts: float, static: bool = False) -> float:
        """Return the seconds with these shares of the tokens and of the experts, which may be static.

        What experts save is in proportion to the tokens that are kept.
        """
        seconds = self.by_static if static else self.by_experts
        saved = seconds[0] - _interpolated(experts, seconds)
        return _interpolated(tokens, self.by_tokens) - tokens * saved


class _Kind(NamedTuple):
    """Name a kind of sample that is timed: shares of tokens and of experts, which may be static, and guidance."""

    tokens: float = 1.0
    experts: float = 1.0
    static: bool = False
    guided: bool = True


class SampleTimes(NamedTuple):
    """Hold the seconds of a whole sample of the accelerated model, and of its scales.

    Args:
        accelerated: seconds of a sample, decoder included.
        scales: by whether there is guidance, and by number of the scale.
    """

    accelerated: float
    scales: Mapping[tuple[bool, int], ScaleTimes]

    def predicted(self, config: ActVARConfig, maps: Sequence[tuple[int, int]], depth: int) -> float:
        """Return the seconds of a sample under a configuration.

        Args:
            config: rates of every block.
            maps: height and width of the token map of every scale.
            depth: number of blocks.
        """
        seconds = self.accelerated
        for block in range(depth):
            for scale in build_schedule(config, maps, block):
                if scale.left_out:
                    seconds -= self.scales[True, scale.index].at(1, 1) / depth
                elif scale.active or not scale.guided:
                    shares = scale.keep / scale.tokens, scale.experts / config.num_experts
                    left = self.scales[scale.guided, scale.index].at(*shares, static=scale.static)
                    seconds -= (self.scales[True, scale.index].at(1, 1) - left) / depth
        return seconds

    def as_lists(self) -> list:
        """Return the times as lists, JSON-compatible."""
        return [self.accelerated, [[*key, *times] for key, times in self.scales.items()]]

    @classmethod
    def from_lists(cls, lists: list) -> SampleTimes:
        """Return the times of which `as_lists` made `lists`."""
        accelerated, scales = lists
        return cls(accelerated, {(guided, scale): ScaleTimes(*times) for guided, scale, *times in scales})


def measured_times(
    var: nn.Module,
    executions: Sequence[Execution],
    conditions: Conditions,
    to_warm_up: Conditions,
    cfg: float,
    first: int,
    drops_guidance: bool,
    ways: Sequence[bool],
    repeats: int,
) -> list[SampleTimes]:
    """Measure the times of a patched model by Execution; its configuration and Execution are put back.

    Each sample has the same rates in every block and in all scales from `first` on. All are timed in turn, so that a
    machine that gets slower or faster does so for all of them.

    Args:
        var: the model, with fitted gates.
        executions: the ways to run it.
        conditions, to_warm_up: as in `sample_laps`.
        cfg: strength of the guidance.
        first: number of the first scale that may change.
        drops_guidance: whether scales without guidance are timed as well.
        ways: of experts that are timed: False for those that routers choose, True for static ones.
        repeats: samples of each kind, fewer where they take longer than `MOST_SECONDS`.
    """
    model = unwrapped(var)
    state = model.actvar
    before = state.config
    scales = range(first, len(family_of(model).maps_of(model, conditions)))

    def config_of(kind: _Kind) -> ActVARConfig:
        return replace(
            before,
            scales=tuple(scales),
            token_rates=(kind.tokens,) * len(scales),
            ffn_rate=kind.experts,
            static_experts=kind.static,
            guidance_until=None if kind.guided else first,
            scales_until=None,
        )

    kinds = {_Kind(tokens=share) for share in SHARES}
    kinds |= {_Kind(experts=share, static=static) for share in SHARES[1:] for static in ways}
    if drops_guidance:
        kinds |= {kind._replace(guided=False) for kind in kinds}
    try:
        setups = {
            (number, kind): (config_of(kind), execution)
            for kind in sorted(kinds, reverse=True)
            for number, execution in enumerate(executions)
        }
        decoded = {(number, _Kind()) for number in range(len(executions))}
        laps = sample_laps(model, setups, conditions, to_warm_up, cfg, repeats, MOST_SECONDS, decoded)
    finally:
        reconfigure(model, before, state.execution)
    return [
        _times_of({kind: runs for (of, kind), runs in laps.items() if of == number}, scales, drops_guidance)
        for number in range(len(executions))
    ]


def _times_of(laps: Mapping[_Kind, list[list[float]]], scales: Iterable[int], drops_guidance: bool) -> SampleTimes:
    """Return the times of the samples of one Execution."""
    medians = {kind: [statistics.median(lap) for lap in zip(*runs, strict=True)] for kind, runs in laps.items()}

    def times_of(guided: bool, scale: int) -> ScaleTimes:
        dense = _Kind(guided=guided)
        by_tokens = [medians[dense._replace(tokens=share)][scale] for share in SHARES]
        by_experts, by_static = (
            [
                medians.get(dense._replace(experts=share, static=share < 1 and static), medians[dense])[scale]
                for share in SHARES
            ]
            for static in (False, True)
        )
        return ScaleTimes(by_tokens, by_experts, by_static)

    return SampleTimes(
        statistics.median(sum(run) for run in laps[_Kind()]),
        {
            (guided, scale): times_of(guided, scale)
            for guided in ((True, False) if drops_guidance else (True,))
            for scale in scales
        },
    )


def sample_laps(
    var: Any,
    setups: Mapping[Any, tuple[ActVARConfig, Execution]],
    conditions: Conditions,
    to_warm_up: Conditions,
    cfg: float,
    repeats: int,
    at_most: float,
    decoded: Collection[Any] | None = None,
) -> dict[Any, list[list[float]]]:
    """Return the seconds of every scale and of the decoder, for `repeats` samples of each setup in turn.

    Args:
        var: a patched model; it keeps the last setup.
        setups: by any name, what is computed and how.
        conditions: of the images of a sample.
        to_warm_up: of the images of a sample of each setup that is not timed, before all others.
        cfg: strength of the guidance.
        repeats: samples of each setup.
        at_most: seconds after which no further turn would end, once each setup has a sample.
        decoded: names of the setups whose images are decoded, None for all; the others' decoder takes no time.
    """
    family = family_of(var)

    def run(name: Any, conditions: Conditions) -> list[float]:
        reconfigure(var, *setups[name])
        draw = family.images if decoded is None or name in decoded else family.token_maps
        return step_seconds(var, lambda: draw(var, conditions, 0, cfg))

    for name in progress([*setups], desc="warming up", leave=False):
        run(name, to_warm_up)
    runs = {name: functools.partial(run, name, conditions) for name in setups}
    return interleaved_seconds(runs, repeats, "times", warm_ups=0, at_most=at_most)


def _interpolated(share: float, seconds: Iterable[float]) -> float:
    """Return the seconds at a share, by straight lines through those at `SHARES`."""
    shares, seconds = SHARES[::-1], list(seconds)[::-1]
    if share < shares[0]:
        return seconds[0] - (seconds[1] - seconds[0]) / (shares[1] - shares[0]) * (shares[0] - share)
    return float(np.interp(share, shares, seconds))
