"""Make plans that may be the best at some time: the cheapest choice of every block and scale at a price of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from actvar.calibrate.fit import BlockFit
from actvar.calibrate.rates import block_losses
from actvar.calibrate.times import SampleTimes
from actvar.config import ActVARConfig, Rate

LEVERS = ("tokens", "experts", "guidance", "int8", "static", "scales")
DEFAULT_LEVERS = LEVERS[:-1]
PRICES = 12
"""Prices of a second, in divergence, that give a plan each."""
FACTORS = (0.0, 0.5, 1.0, 1.5)
"""Shares of what an adapter's own rates leave out that are tried of an adapter."""
LEAST_RATE, LEAST_SHARE = 0.25, 0.5
"""Least rate of an adapter's scaled plans, and least share of the experts of fitted ones."""
GUIDED_SCALES, SAMPLED_SCALES = 4, 2
"""Last scales at which an end of guidance is tried, and an end of sampling."""


@dataclass(frozen=True)
class Fitted:
    """Hold what the plans of a model without an adapter follow from.

    Args:
        base: the active scales.
        fits: of the blocks.
        sensitivity: per block, see `divergence_per_block`.
        unguided: the divergence of the dense model's conditional logits from its guided ones, by scale.
        unpredicted: the divergence of the uniform distribution from the guided logits, by scale.
    """

    base: ActVARConfig
    fits: list[BlockFit]
    sensitivity: list[dict[int, tuple[float, float]]]
    unguided: Sequence[float]
    unpredicted: Sequence[float]


Choice = tuple[float, float, tuple[float, float]]
"""The divergence of a choice of one block at one scale, the seconds that it saves, and its rates."""


def fitted_plans(fitted: Fitted, times: SampleTimes, levers: Sequence[str]) -> Iterator[tuple[ActVARConfig, float]]:
    """Yield plans and the total divergence that is expected of each: first the dense model, then every combination.

    Combinations are those of an end of guidance, an end of sampling, and experts that are routed or static. At each
    price of a second, every block and scale has the choice that costs the least.

    Args:
        fitted: the model's fits.
        times: of the scales.
        levers: of `LEVERS`.
    """
    base, count = fitted.base, len(fitted.unguided)
    ones = ((1.0,) * len(fitted.fits),) * len(base.scales)
    yield replace(base, token_rates=ones, ffn_rate=ones), 0.0
    for end in ends_of(levers, "guidance", GUIDED_SCALES, count):
        for until in ends_of(levers, "scales", SAMPLED_SCALES, count):
            sampled = count if until is None else count + until
            without = range(count if end is None else min(count + end, sampled), sampled)
            fixed = sum(fitted.unguided[scale] for scale in without) + sum(fitted.unpredicted[sampled:])
            for static in ways_of(levers):
                options = [
                    _options(fitted, times, levers, scale % count, scale % count not in without, static)
                    if scale % count < sampled
                    else [[(0.0, 0.0, (1.0, 1.0))] for _ in fitted.fits]
                    for scale in base.scales
                ]
                changes = replace(base, static_experts=static, guidance_until=end, scales_until=until)
                for config, lost in _at_prices(changes, options):
                    yield config, lost + fixed


def _at_prices(base: ActVARConfig, options: list[list[list[Choice]]]) -> Iterator[tuple[ActVARConfig, float]]:
    """Yield `base` with the cheapest choices at every price of a second, and their divergence.

    Args:
        base: all but the rates.
        options: by active scale and block.
    """
    slopes = [loss / saved for scale in options for block in scale for loss, saved, _ in block if saved > 0]
    prices = np.quantile(slopes, np.linspace(0, 1, PRICES)) if slopes else []
    for price in dict.fromkeys([0.0, *prices]):
        chosen = [[min(block, key=lambda o: o[0] - price * o[1]) for block in scale] for scale in options]
        yield (
            replace(
                base,
                token_rates=tuple(tuple(tokens for _, _, (tokens, _) in scale) for scale in chosen),
                ffn_rate=tuple(tuple(experts for _, _, (_, experts) in scale) for scale in chosen),
            ),
            sum(loss for scale in chosen for loss, _, _ in scale),
        )


def _options(
    fitted: Fitted, times: SampleTimes, levers: Sequence[str], scale: int, guided: bool, static: bool
) -> list[list[Choice]]:
    """Return all choices of each block at one scale."""
    seconds = times.scales[guided, scale]
    may_thin = static or "experts" in levers
    blocks = []
    for fit, divergences in zip(fitted.fits, fitted.sensitivity, strict=True):
        curves = fit.curves[scale]
        options = []
        for (keep, experts), loss in block_losses(curves, *divergences[scale], static=static).items():
            tokens, share = keep / curves.tokens, experts / curves.num_experts
            if ("tokens" in levers or tokens == 1) and (may_thin or share == 1) and share >= LEAST_SHARE:
                saved = (seconds.at(1, 1) - seconds.at(tokens, share, static)) / len(fitted.fits)
                options.append((loss, saved, (tokens, share)))
        blocks.append(options)
    return blocks


def ends_of(levers: Sequence[str], lever: str, most: int, count: int) -> list[int | None]:
    """Return the ends to try: None, and if the lever is among `levers` the last scales, at most `most` of `count`."""
    return [None, *(-scales for scales in range(1, min(most, count - 1) + 1) if lever in levers)]


def ways_of(levers: Sequence[str]) -> list[bool]:
    """Return which experts to try, False for those that routers choose and True for static ones."""
    return [
        *([False] if "experts" in levers or "static" not in levers else []),
        *([True] if "static" in levers else []),
    ]


def scaled_plans(base: ActVARConfig, levers: Sequence[str], scales: int) -> Iterator[ActVARConfig]:
    """Yield an adapter's configuration with more and less left out.

    Args:
        base: the adapter's configuration.
        levers: of `LEVERS`.
        scales: number of the model's scales.
    """
    ends, untils = [base.guidance_until], [base.scales_until]
    if base.guidance_until is None:
        ends = ends_of(levers, "guidance", GUIDED_SCALES, scales)
    if base.scales_until is None:
        untils = ends_of(levers, "scales", SAMPLED_SCALES, scales)
    thins = "static" if base.static_experts else "experts"
    for until in untils:
        for end in ends:
            for tokens in FACTORS if "tokens" in levers else (0.0,):
                for experts in FACTORS if thins in levers else (0.0,):
                    yield replace(
                        base,
                        token_rates=tuple(_scaled(rate, tokens) for rate in base.token_rates),
                        ffn_rate=tuple(_scaled(rate, experts) for rate in base.ffn_rates),
                        guidance_until=end,
                        scales_until=until,
                    )


def _scaled(rate: Rate, factor: float) -> Rate:
    """Return a rate, or those of all blocks, that leave out `factor` times as much."""
    if isinstance(rate, tuple):
        return tuple(max(LEAST_RATE, 1 - factor * (1 - each)) for each in rate)
    return max(LEAST_RATE, 1 - factor * (1 - rate))
