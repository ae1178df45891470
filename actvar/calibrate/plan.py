"""Plan what to leave out and what to multiply in eight bits: the least divergence for a time, or the least time.

Times are measured on this machine, and divergences from the dense model's guided logits on samples that nothing was
fitted to. A plan is one configuration, with rates for every block and scale, and one Execution.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from actvar.calibrate.calibration import fits_of, held_out_samples, move_patch, patch_with, samples_to_fit
from actvar.calibrate.choices import (
    DEFAULT_LEVERS,
    GUIDED_SCALES,
    LEVERS,
    SAMPLED_SCALES,
    Fitted,
    fitted_plans,
    scaled_plans,
    ways_of,
)
from actvar.calibrate.fit import BlockFit
from actvar.calibrate.fit_file import load_fits, save_fits
from actvar.calibrate.goal import Goal
from actvar.calibrate.plan_report import Candidate, PlanReport
from actvar.calibrate.sensitivity import divergence_per_block
from actvar.calibrate.times import SampleTimes, measured_times, sample_laps
from actvar.calibrate.trials import choose_by_trial
from actvar.config import DENSE, ActVARConfig
from actvar.evaluate.predictions import DensePredictions
from actvar.execution import Execution
from actvar.families import blocks_of, family_of
from actvar.families.conditions import Conditions, Texts, features_of
from actvar.models.arguments import checked_finite
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import load_silently, patch_silently, reconfigure, remove_patch
from actvar.sampling.token_maps import first_conditions
from actvar.sparse.block_state import set_order_and_gates
from actvar.sparse.schedule import scales_with_guidance
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of
from actvar.utils.fingerprint import fingerprint, model_fingerprint
from actvar.utils.parts import Parts
from actvar.utils.progress import progress
from actvar.utils.weight_override import tuned_parameters
from actvar.utils.wrappers import unwrapped
from actvar_kernels.backend import BackendUnavailableError, choose_eight_bits
from actvar_kernels.cpu_backend.choices import processor

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_PLANS, FEWEST_PLANS, SECONDS_OF_PLANS = 24, 6, 240.0
"""Plans whose divergence is measured, the others being too near to one of these: as many as take so many seconds."""
SECONDS_OF_TRIAL = 60.0
"""Seconds of a trial after which no further turn of samples would end."""


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
    cfg: float | None = None,
    texts: Texts | None = None,
    tokenizer: Any = None,
    repeats: int = 5,
    folder: Path | None = None,
) -> PlanReport:
    """Patch `var` with the plan that meets a goal best; `save_adapter` writes it.

    Without an adapter, selectors, routers and experts are fitted first (`actvar.calibrate`). With one, its gates and
    weights stay, its rates are scaled, and its end of guidance stays where it has one.

    Args:
        var: a VAR or an Infinity in eval mode; a patch that it has is removed.
        goal: a speedup, a time, a divergence or a preset.
        levers: of `LEVERS`, what a plan may change; None for all of `DEFAULT_LEVERS` that run here.
        adapter: file of an adapter to plan again for, or None.
        execution: how the model is run; None for the default, or the adapter's.
        num_experts: experts of the fit.
        batch: images of a sample whose time is measured.
        images: samples to fit to and to measure divergences by.
        seed: of these samples.
        cfg: guidance strength; None for 1.5, and for 4 of a model that draws from texts.
        texts: what a model that draws from texts samples; None for classes.
        tokenizer: an `actvar.models.InfinityTokenizer` for the public class of Infinity, which holds none; times are
            then those of our class with its weights. None for another model.
        repeats: samples of each kind that are timed, fewer where that takes minutes.
        folder: keeps fits, times and divergences, so that the same call goes on after an interruption; None: they are
            not kept.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: levers that there are not, or that the adapter does not have; a tokenizer for a model that has its
            own, or none or an adapter for the public class of Infinity; the errors of `calibrate`.
        BackendUnavailableError: products in eight bits are asked for and do not run here.
    """
    model = unwrapped(var)
    levers = _checked_levers(model, levers, None if adapter is None else read_adapter_config(adapter))
    remove_patch(model)
    family = family_of(model)
    twin = family.drawing_twin(model, tokenizer)
    if (twin is None) != (tokenizer is None):
        kind = type(model).__name__
        wanted = "None, since the model has its own" if twin is None else "that of the model, which holds none"
        raise ValueError(f"tokenizer: expected {wanted}, got {type(tokenizer).__name__} with {kind}")
    if twin is not None:
        if adapter is not None:
            raise ValueError(
                "adapter: expected None with this class; plan for that of actvar.load_infinity, whose adapters fit both"
            )
        patch_silently(model, replace(ActVARConfig(), num_experts=num_experts), execution)
        remove_patch(model)
        report = plan(
            twin,
            goal,
            levers,
            execution=execution,
            num_experts=num_experts,
            batch=batch,
            images=images,
            seed=seed,
            cfg=cfg,
            texts=texts,
            repeats=repeats,
            folder=folder,
        )
        move_patch(twin, model, report.chosen.execution)
        return report
    cfg = family.default_cfg if cfg is None else checked_finite("cfg", cfg)
    timed = first_conditions(model, batch, texts)
    # On a CPU a first sample makes copies of weights, which one image does as well.
    to_warm_up = timed if device_of(model).type == "cuda" else first_conditions(model, 1, texts)
    maps, depth = family.maps_of(model, timed), len(blocks_of(model))
    of_texts = {} if texts is None else {"texts": fingerprint([("texts", features_of(texts))]), "maps": maps}
    kept = _Kept(folder, model, images=images, seed=seed, cfg=cfg, num_experts=num_experts, **of_texts)
    dense = DensePredictions(model, samples_to_fit(model, images, seed + images, cfg, texts), cfg)
    goal = goal.with_kl(statistics.fmean(dense.divergences_from_uniform[-2:]))
    batches, fits = [], []
    if adapter is None:
        batches = samples_to_fit(model, images, seed, cfg, texts)
        base = replace(ActVARConfig(), num_experts=num_experts)
        fits = kept.fits(lambda: fits_of(model, base, batches))
        patch_with(model, base, execution, fits)
    else:
        load_silently(model, adapter, execution)
        base = patch_state(model).config
        kept.facts["adapter"] = model_fingerprint(model)
    count = len(maps)
    given = patch_state(model).execution
    executions = [given] if "int8" not in levers or given.weights else [given, replace(given, weights="int8")]
    guides = "guidance" in levers
    first, ways = _first_scale(base, levers, count), [base.static_experts] if adapter else ways_of(levers)
    here = {"batch": batch, "repeats": repeats, "first": first, "ways": ways, "guidance": guides}
    here |= {"dtype": str(next(model.parameters()).dtype), "machine": processor(), "threads": torch.get_num_threads()}

    def measure() -> list:
        found = measured_times(model, executions, timed, to_warm_up, cfg, first, guides, ways, repeats)
        return [of_execution.as_lists() for of_execution in found]

    here["executions"] = list(map(asdict, executions))
    times = [SampleTimes.from_lists(lists) for lists in kept.part("times", here, measure)]
    if adapter is None:
        sensitivity = kept.sensitivity(lambda: divergence_per_block(model, base, *held_out_samples(batches)))
        unguided, unpredicted = dense.divergences_without_guidance(), dense.divergences_from_uniform
        fitted = Fitted(base, fits, sensitivity, unguided, unpredicted)

    def divergence_of(config: ActVARConfig, execution: Execution) -> tuple[float, float]:
        facts = [config.to_json(), execution.to_json()]
        mean, total = kept.part("plan", facts, lambda: _divergence(model, dense, maps, fits, config, execution))
        return mean, total

    guesses: dict[tuple[ActVARConfig, Execution], Candidate] = {}
    for execution, of_format in zip(executions, times, strict=True):
        if adapter is None:
            plans = fitted_plans(fitted, of_format, levers)
        else:
            plans = ((config, 0.0) for config in scaled_plans(base, levers, count))
        least = 0.0 if execution == given else divergence_of(base.without_savings(), execution)[1]
        for config, guess in plans:
            seconds = of_format.predicted(config, maps, depth)
            guesses[config, execution] = Candidate(config, seconds, 0, least + guess, execution)
    curve, begin = [], time.perf_counter()
    for guess in progress(_worth_measuring([*guesses.values()]), desc="plans"):
        if len(curve) >= FEWEST_PLANS and time.perf_counter() - begin > SECONDS_OF_PLANS:
            break
        divergence, total = divergence_of(guess.config, guess.execution)
        curve.append(replace(guess, divergence=divergence, total=total))
    curve.sort(key=lambda each: -each.seconds)
    is_met, chosen, *seconds = choose_by_trial(
        goal,
        curve,
        times[0].accelerated,
        lambda chosen: _measured(model, chosen, given, timed, to_warm_up, cfg, repeats),
    )
    _configure(model, fits, chosen.config, chosen.execution)
    kept.remove()
    return PlanReport(goal, chosen, is_met, tuple(curve), *(1e3 * each for each in seconds))


class _Kept:
    """Keep what a plan follows from in a folder, if there is one, until the plan is made.

    Args:
        folder: of the files, or None.
        model: the dense model.
        facts: settings on which all parts depend.
    """

    def __init__(self, folder: Path | None, model: nn.Module, **facts: object):
        self.parts = None if folder is None else Parts(folder)
        self.device = device_of(model)
        self.facts = {} if folder is None else {"model": model_fingerprint(model), "device": str(self.device), **facts}

    def part(self, name: str, facts: object, compute: Callable[[], T]) -> T:
        """Return the JSON-compatible result of `compute()`, from this call or an interrupted one before."""
        if self.parts is None:
            return compute()
        return self.parts.get(name, [self.facts, facts], lambda _: compute())

    def sensitivity(
        self, compute: Callable[[], list[dict[int, tuple[float, float]]]]
    ) -> list[dict[int, tuple[float, float]]]:
        """Return the result of `divergence_per_block`."""

        def rows() -> list[list[list]]:
            return [[[scale, *divergences] for scale, divergences in block.items()] for block in compute()]

        found = self.part("sensitivity", None, rows)
        return [{scale: (tokens, experts) for scale, tokens, experts in block} for block in found]

    def fits(self, compute: Callable[[], list[BlockFit]]) -> list[BlockFit]:
        """Return the fits of all blocks."""
        if self.parts is None:
            return compute()
        path = self.parts.path("fits", self.facts).with_suffix(".safetensors")
        if not path.exists():
            save_fits(compute(), path)
        return load_fits(path, self.device)

    def remove(self) -> None:
        """Remove the files."""
        if self.parts is not None:
            self.parts.remove()


def _checked_levers(model: Any, levers: Sequence[str] | None, adapter: ActVARConfig | None) -> Sequence[str]:
    """Return `levers`, or those of `DEFAULT_LEVERS` that run here for None.

    Raises:
        ValueError: levers that there are not, none, or some that the adapter's configuration does not have.
        BackendUnavailableError: products in eight bits do not run here.
    """
    other = None if adapter is None else "experts" if adapter.static_experts else "static"
    if levers is None:
        default = [lever for lever in DEFAULT_LEVERS if lever != other]
        try:
            return _checked_levers(model, default, adapter)
        except (BackendUnavailableError, ValueError) as error:
            logger.warning("plans have no products in eight bits: %s", error)
            return [lever for lever in default if lever != "int8"]
    wrong = [lever for lever in levers if lever not in LEVERS]
    if wrong or not levers:
        raise ValueError(f"levers: expected some of {', '.join(LEVERS)}, got {', '.join(wrong) or 'none'}")
    if other in levers:
        kind = "static" if other == "experts" else "chosen by routers"
        raise ValueError(
            f"levers: the adapter's experts are {kind}, got {other}; leave it out, or plan without adapter"
        )
    if adapter is not None and adapter.guidance_until is not None and "guidance" not in levers:
        raise ValueError("levers: the adapter has its end of guidance, so expected guidance among them")
    if "scales" in levers and not family_of(model).ends_early(model):
        raise ValueError(f"levers: {type(model).__name__} samples all scales in a loop of its own, got scales")
    if "int8" in levers:
        if not family_of(model).takes_eight_bits:
            raise ValueError(f"levers: {family_of(model).name} does not multiply in eight bits")
        with torch.no_grad():
            choose_eight_bits("levers: a product", torch.int8, next(model.parameters()))
    return levers


def _first_scale(base: ActVARConfig, levers: Sequence[str], count: int) -> int:
    """Return the number of the first of `count` scales at which a plan may change anything."""
    firsts = [scale % count for scale in base.scales]
    if "guidance" in levers:
        firsts += [max(1, count - GUIDED_SCALES), scales_with_guidance(base, count)]
    if "scales" in levers:
        firsts.append(max(1, count - SAMPLED_SCALES))
    return min(firsts)


def _worth_measuring(guesses: list[Candidate]) -> list[Candidate]:
    """Return at most `MOST_PLANS` plans without those that another plan is expected to beat.

    The slowest and the fastest come first. Every first part of the others is spread over their times.
    """
    kept: list[Candidate] = []
    for guess in sorted(guesses, key=lambda guess: (guess.seconds, guess.total)):
        if not kept or guess.total < kept[-1].total or guess.total == 0:
            kept.append(guess)
    if len(kept) > MOST_PLANS:
        kept = [kept[round(place)] for place in np.linspace(0, len(kept) - 1, MOST_PLANS)]
    fastest, *between, slowest = kept if len(kept) > 1 else (*kept, *kept)
    order = sorted(range(len(between)), key=lambda place: f"{place:08b}"[::-1])
    return [slowest, fastest, *(between[place] for place in order)][: len(kept)]


def _configure(model: Any, fits: list[BlockFit], config: ActVARConfig, execution: Execution) -> None:
    """Give the model a configuration, and its hidden units the order of that configuration's experts."""
    for block, fit in zip(blocks_of(model), fits or len(blocks_of(model)) * [None], strict=True):
        if fit is not None:
            set_order_and_gates(block, fit.order_for(config))
    reconfigure(model, config, execution)


def _divergence(
    model: Any,
    dense: DensePredictions,
    maps: tuple[tuple[int, int], ...],
    fits: list[BlockFit],
    config: ActVARConfig,
    execution: Execution,
) -> tuple[float, float]:
    """Return `Candidate.divergence` and `Candidate.total` of a configuration, with token maps of these sizes."""
    _configure(model, fits, config, execution)
    state = patch_state(model)
    state.fit_maps(model, maps)
    weights_change = bool(tuned_parameters(model))
    changed = {
        scale.index
        for schedule in state.schedules
        for scale in schedule
        if any(state.quantized)
        or scale.active
        or not scale.guided
        or (weights_change and scale.tuned)
        or scale.left_out
    }
    found, uniform = dense.divergences(model)["kl_drawn"], dense.divergences_from_uniform
    by_scale = [nothing if kl is None else kl for kl, nothing in zip(found, uniform, strict=True)]
    values = [by_scale[index] for index in changed]
    return (statistics.fmean(values), sum(values)) if values else (0.0, 0.0)


def _measured(
    model: Any,
    plan: Candidate,
    execution: Execution,
    conditions: Conditions,
    to_warm_up: Conditions,
    cfg: float,
    repeats: int,
) -> tuple[float, float]:
    """Return the seconds of a batch of the accelerated model, run as `execution` says, and of a plan, in turn."""
    dense = replace(DENSE, num_experts=plan.config.num_experts)
    setups = {"accelerated": (dense, execution), "plan": (plan.config, plan.execution)}
    laps = sample_laps(model, setups, conditions, to_warm_up, cfg, repeats + 2, SECONDS_OF_TRIAL)
    accelerated, measured = (statistics.median(map(sum, laps[name])) for name in ("accelerated", "plan"))
    return accelerated, measured
