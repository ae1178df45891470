"""Plan which tokens, experts and scales with guidance to keep: the least divergence for a time, or the least time.

Times are measured on this machine, and divergences from the dense model's guided logits on samples that nothing was
fitted to. A plan is one configuration, with rates for every block and scale.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from actvar.calibrate.calibration import held_out_samples, patch_with_fits, samples_to_fit
from actvar.calibrate.fit import BlockFit
from actvar.calibrate.goal import Goal
from actvar.calibrate.plan_report import Candidate, PlanReport
from actvar.calibrate.rates import block_losses
from actvar.calibrate.sensitivity import divergence_per_block
from actvar.calibrate.times import SampleTimes, measured_times, sample_laps
from actvar.config import DENSE, ActVARConfig, Rate
from actvar.evaluate.predictions import DensePredictions
from actvar.execution import Execution
from actvar.families import family_of
from actvar.patching.patch import load_silently, reconfigure, remove_patch
from actvar.sparse.schedule import scales_with_guidance
from actvar.sparse.state import patch_state
from actvar.utils.progress import progress
from actvar.utils.weight_override import tuned_parameters
from actvar.utils.wrappers import unwrapped
from actvar_kernels.backend import BackendUnavailableError, choose_int8

logger = logging.getLogger(__name__)

LEVERS = ("tokens", "experts", "guidance", "int8")
PRICES = 12
"""Prices of a second, in divergence, that give a plan each."""
MOST_PLANS = 24
"""Plans whose divergence is measured; the others are too near to one of these."""
FACTORS = (0.0, 0.5, 1.0, 1.5)
"""Shares of what an adapter's own rates leave out that are tried of an adapter."""
LEAST_RATE = 0.25
MOST_TRIALS, TOLERANCE = 3, 0.05
"""Plans that are tried until one is as fast as predicted, and by how much it may be slower."""
GUIDED_SCALES = 4
"""Last scales at which an end of guidance is tried."""


def plan(
    var: nn.Module,
    goal: Goal,
    levers: Sequence[str] | None = None,
    *,
    adapter: Any = None,
    execution: Execution | None = None,
    num_experts: int = 16,
    batch: int = 8,
    images: int = 16,
    seed: int = 0,
    cfg: float = 1.5,
    repeats: int = 3,
) -> PlanReport:
    """Patch `var` with the plan that meets a goal best; `save_adapter` writes it.

    Without an adapter, selectors, routers and experts are fitted first (`actvar.calibrate`). With one, its gates and
    weights stay, its rates are scaled, and its end of guidance stays where it has one.

    Args:
        var: a VAR in eval mode; a patch that it has is removed.
        goal: a speedup, a time or a divergence.
        levers: of `LEVERS`, what a plan may change; None for all that run here.
        adapter: file of an adapter to plan again for, or None.
        execution: how the model is run; None for the default, or the adapter's.
        num_experts: experts of the fit.
        batch: images of a sample whose time is measured.
        images: samples to fit to and to measure divergences by.
        seed: of these samples.
        cfg: guidance strength.
        repeats: samples of each kind that are timed.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: levers that there are not, or that the adapter does not have; the errors of `calibrate`.
        BackendUnavailableError: products in eight bits are asked for and do not run here.
    """
    model = unwrapped(var)
    levers = _checked_levers(model, levers)
    remove_patch(model)
    dense = DensePredictions(model, samples_to_fit(model, images, seed + images, cfg), cfg)
    if adapter is None:
        batches = samples_to_fit(model, images, seed, cfg)
        base = replace(ActVARConfig(), num_experts=num_experts)
        fits = patch_with_fits(model, base, execution, batches)
    else:
        load_silently(model, adapter, execution)
        base, fits = patch_state(model).config, []
        if base.guidance_until is not None and "guidance" not in levers:
            raise ValueError("levers: the adapter has its end of guidance, so expected guidance among them")
    maps = family_of(model).maps(model)
    first = min(scale % len(maps) for scale in base.scales)
    if "guidance" in levers:
        first = min(first, max(1, len(maps) - GUIDED_SCALES), scales_with_guidance(base, len(maps)))
    given = patch_state(model).execution
    executions = [given] if "int8" not in levers or given.weights else [given, replace(given, weights="int8")]
    times = [measured_times(model, each, batch, cfg, first, "guidance" in levers, repeats) for each in executions]
    sensitivity = [] if adapter is not None else divergence_per_block(model, base, *held_out_samples(batches))
    unguided = [] if adapter is not None else dense.divergences_without_guidance()
    depth = len(family_of(model).blocks(model))
    guesses: dict[tuple[ActVARConfig, Execution], Candidate] = {}
    for execution, of_format in zip(executions, times, strict=True):
        if adapter is None:
            plans = _fitted_plans(base, fits, sensitivity, of_format, levers, unguided)
        else:
            plans = ((config, 0.0) for config in _scaled_plans(base, levers, len(maps)))
        least = 0.0 if execution == given else _divergence(model, dense, base.without_savings(), execution)[1]
        for config, guess in plans:
            seconds = of_format.predicted(config, maps, depth)
            guesses[config, execution] = Candidate(config, seconds, 0, least + guess, execution)
    kept = progress(_worth_measuring([*guesses.values()]), desc="plans")
    curve = []
    for guess in kept:
        divergence, total = _divergence(model, dense, guess.config, guess.execution)
        curve.append(replace(guess, divergence=divergence, total=total))
    factor, dense_seconds = 1.0, times[0].accelerated
    for _ in range(MOST_TRIALS):
        corrected = [replace(each, seconds=each.seconds * factor) for each in curve]
        chosen, is_met = goal.best(corrected, dense_seconds)
        accelerated, measured = _measured(model, chosen, given, batch, cfg, repeats)
        slowdown = measured / accelerated * dense_seconds / chosen.seconds
        if not is_met or slowdown <= 1 + TOLERANCE:
            break
        factor *= slowdown
    chosen = curve[corrected.index(chosen)]
    reconfigure(model, chosen.config, chosen.execution)
    milliseconds = (1e3 * seconds for seconds in (accelerated, chosen.seconds, measured))
    return PlanReport(goal, chosen, is_met, tuple(curve), *milliseconds)


def _checked_levers(model: Any, levers: Sequence[str] | None) -> Sequence[str]:
    """Return `levers`, or all that run here for None.

    Raises:
        ValueError: levers that there are not, or none.
        BackendUnavailableError: products in eight bits do not run here.
    """
    if levers is None:
        try:
            return _checked_levers(model, LEVERS)
        except (BackendUnavailableError, ValueError) as error:
            logger.warning("plans have no products in eight bits: %s", error)
            return [lever for lever in LEVERS if lever != "int8"]
    wrong = [lever for lever in levers if lever not in LEVERS]
    if wrong or not levers:
        raise ValueError(f"levers: expected some of {', '.join(LEVERS)}, got {', '.join(wrong) or 'none'}")
    if "int8" in levers:
        if not family_of(model).takes_int8:
            raise ValueError(f"levers: {family_of(model).name} does not multiply in eight bits")
        with torch.no_grad():
            choose_int8("levers: a product", next(model.parameters()))
    return levers


def _worth_measuring(guesses: list[Candidate]) -> list[Candidate]:
    """Return at most `MOST_PLANS` plans, the fastest last, without those that another plan is expected to beat."""
    kept: list[Candidate] = []
    for guess in sorted(guesses, key=lambda guess: (guess.seconds, guess.total)):
        if not kept or guess.total < kept[-1].total or guess.total == 0:
            kept.append(guess)
    if len(kept) > MOST_PLANS:
        kept = [kept[round(place)] for place in np.linspace(0, len(kept) - 1, MOST_PLANS)]
    return kept[::-1]


def _fitted_plans(
    base: ActVARConfig,
    fits: list[BlockFit],
    sensitivity: list[dict[int, tuple[float, float]]],
    times: SampleTimes,
    levers: Sequence[str],
    unguided: Sequence[float],
) -> Iterator[tuple[ActVARConfig, float]]:
    """Yield plans and the total divergence that is expected of each: first the dense model, then every end of guidance.

    At each price of a second, every block and scale has the choice that costs the least.

    Args:
        base: the active scales.
        fits: of the blocks.
        sensitivity: per block, see `divergence_per_block`.
        times: of the scales.
        levers: of `LEVERS`.
        unguided: the divergence of the dense model's conditional logits from its guided ones, by scale.
    """
    count = len(unguided)
    ends: list[int | None] = [None]
    if "guidance" in levers:
        ends += [-scales for scales in range(1, min(GUIDED_SCALES, count - 1) + 1)]
    ones = ((1.0,) * len(fits),) * len(base.scales)
    yield replace(base, token_rates=ones, ffn_rate=ones), 0.0
    for end in ends:
        without = {} if end is None else {scale: unguided[scale] for scale in range(count + end, count)}
        options = [
            _options(base, fits, sensitivity, times, levers, scale % count, scale % count not in without)
            for scale in base.scales
        ]
        blocks = [block for scale in options for block in scale]
        slopes = [loss / saved for block in blocks for loss, saved, _ in block if saved > 0]
        prices = np.quantile(slopes, np.linspace(0, 1, PRICES)) if slopes else [0.0]
        for price in dict.fromkeys([0.0, *prices]):
            chosen = [[min(block, key=lambda o: o[0] - price * o[1]) for block in scale] for scale in options]
            rates = {
                "token_rates": tuple(tuple(tokens for _, _, (tokens, _) in scale) for scale in chosen),
                "ffn_rate": tuple(tuple(experts for _, _, (_, experts) in scale) for scale in chosen),
            }
            expected = sum(loss for scale in chosen for loss, _, _ in scale) + sum(without.values())
            yield replace(base, **rates, guidance_until=end), expected


def _options(
    base: ActVARConfig,
    fits: list[BlockFit],
    sensitivity: list[dict[int, tuple[float, float]]],
    times: SampleTimes,
    levers: Sequence[str],
    scale: int,
    guided: bool,
) -> list[list[tuple[float, float, tuple[float, float]]]]:
    """Return for each block at one scale the divergence, the seconds saved, and the rates of every choice."""
    seconds = times.scales[guided, scale]
    blocks = []
    for fit, divergences in zip(fits, sensitivity, strict=True):
        curves = fit.curves[scale]
        options = []
        for (keep, experts), loss in block_losses(curves, *divergences[scale]).items():
            tokens, share = keep / curves.tokens, experts / curves.num_experts
            if ("tokens" in levers or tokens == 1) and ("experts" in levers or share == 1) and share >= 0.5:
                saved = (seconds.at(1, 1) - seconds.at(tokens, share)) / len(fits)
                options.append((loss, saved, (tokens, share)))
        blocks.append(options)
    return blocks


def _scaled_plans(base: ActVARConfig, levers: Sequence[str], scales: int) -> Iterator[ActVARConfig]:
    """Yield an adapter's configuration with more and less left out."""
    ends: list[int | None] = [base.guidance_until]
    if base.guidance_until is None and "guidance" in levers:
        ends += [-count for count in range(1, min(GUIDED_SCALES, scales - 1) + 1)]
    for end in ends:
        for tokens in FACTORS if "tokens" in levers else (0.0,):
            for experts in FACTORS if "experts" in levers else (0.0,):
                yield replace(
                    base,
                    token_rates=tuple(_scaled(rate, tokens) for rate in base.token_rates),
                    ffn_rate=tuple(_scaled(rate, experts) for rate in base.ffn_rates),
                    guidance_until=end,
                )


def _scaled(rate: Rate, factor: float) -> Rate:
    """Return a rate, or those of all blocks, that leave out `factor` times as much."""
    if isinstance(rate, tuple):
        return tuple(max(LEAST_RATE, 1 - factor * (1 - each)) for each in rate)
    return max(LEAST_RATE, 1 - factor * (1 - rate))


def _divergence(model: Any, dense: DensePredictions, config: ActVARConfig, execution: Execution) -> tuple[float, float]:
    """Return `Candidate.divergence` and `Candidate.total` of a configuration."""
    reconfigure(model, config, execution)
    state = patch_state(model)
    weights_change = bool(tuned_parameters(model))
    changed = {
        scale.index
        for schedule in state.schedules
        for scale in schedule
        if any(state.int8) or scale.active or not scale.guided or (weights_change and scale.tuned)
    }
    found = dense.divergences(model)["kl_drawn"]
    values = [kl for index, kl in enumerate(found) if index in changed and kl is not None]
    return (statistics.fmean(values), sum(values)) if values else (0.0, 0.0)


def _measured(
    model: Any, plan: Candidate, execution: Execution, batch: int, cfg: float, repeats: int
) -> tuple[float, float]:
    """Return the seconds of a batch of the accelerated model, run as `execution` says, and of a plan, in turn."""
    dense = replace(DENSE, num_experts=plan.config.num_experts)
    setups = {"accelerated": (dense, execution), "plan": (plan.config, plan.execution)}
    laps = sample_laps(model, setups, batch, cfg, repeats + 2)
    accelerated, measured = (statistics.median(map(sum, laps[name])) for name in ("accelerated", "plan"))
    return accelerated, measured
