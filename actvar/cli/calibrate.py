"""Make an adapter without training, by `actvar calibrate`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch import nn

import actvar
from actvar.calibrate import calibrate
from actvar.calibrate.choices import LEVERS
from actvar.calibrate.goal import PRESETS, Goal
from actvar.calibrate.plan import plan
from actvar.cli.options import (
    DTYPES,
    adapter_of,
    add_draw,
    add_rates,
    add_source,
    at_once,
    check_source,
    describe,
    expect_file,
    load,
    number,
    positive,
    say_device,
    strength_of,
    with_rates,
    write_json,
)
from actvar.cli.sample_infinity import (
    add_infinity,
    is_of_texts,
    load_to_sample_texts,
    request_of_texts,
    use_default_prompts,
)
from actvar.patching.adapter import read_adapter
from actvar_kernels.cpu_backend.choices import processor


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `calibrate` to its parser."""
    add_source(command, adapter="none, which fits one; with an adapter, a goal plans again for its gates and weights")
    add_infinity(command)
    command.add_argument(
        "--out", type=Path, required=True, help="adapter file to write; the report goes beside it as .json"
    )
    add_rates(command, "0.75 0.75 0.75")
    goal = command.add_argument_group("a plan by measured time (instead of --rates)")
    goal.add_argument("--speedup", type=number, help="of a whole sample with decoder, over the accelerated dense model")
    goal.add_argument("--budget-ms", type=number, help="milliseconds that a batch may take on this machine")
    goal.add_argument("--kl", type=number, help="mean KL to the dense guided logits, over the scales that change")
    goal.add_argument(
        "--preset",
        dest="quality",  # `preset` is that of a bundled model in other commands
        help="a divergence in proportion to that of the uniform distribution: "
        + ", ".join(f"{name} {share:.0%}%" for name, share in PRESETS.items()),
    )
    goal.add_argument(
        "--levers",
        help=f"what may change, of {','.join(LEVERS)} (default: all but scales that run here)",
    )
    goal.add_argument("--batch", type=at_once, default=8, help="images whose time is measured (default 8)")
    goal.add_argument(
        "--repeats",
        type=positive,
        default=5,
        help="samples of each kind that are timed, fewer where that takes minutes (default 5)",
    )
    command.add_argument(
        "--uniform", action="store_true", help="these rates in every block, not the best at their FLOPs"
    )
    command.add_argument("--experts", type=positive, default=16, help="experts the FFN is cut into (default 16)")
    command.add_argument("--samples", type=at_once, default=16, help="samples of the model to fit to (default 16)")
    add_draw(command, filters=False, texts=True)


def run(options: argparse.Namespace) -> None:
    """Fit an adapter to samples of the model, and write it with a report."""
    of_texts = is_of_texts(options)
    if not of_texts:
        check_source(options)
    expect_file("--out", options.out)
    if options.out.suffix == ".json":
        raise ValueError(f"--out: expected the adapter's name, such as adapter.safetensors, got {options.out}")
    goals = {name: getattr(options, name) for name in ("speedup", "budget_ms", "kl")} | {"preset": options.quality}
    if any(value is not None for value in goals.values()):
        _run_plan(options, of_texts, Goal(**goals))
        return
    if options.adapter is not None:
        raise ValueError("--adapter: expected a goal with it, one of --speedup, --budget-ms, --kl and --preset")
    config = with_rates(actvar.ActVARConfig(num_experts=options.experts), options.rates)
    model, drawn = _loaded(options, of_texts)
    begin = time.perf_counter()
    report = calibrate(model, config, images=options.samples, seed=options.seed, uniform=options.uniform, **drawn)
    seconds = time.perf_counter() - begin
    actvar.save_adapter(model, options.out)
    facts = {"device": options.device, "images": options.samples, "cfg": drawn["cfg"], "seed": options.seed}
    written = options.out.with_suffix(".json")
    write_json(written, facts | {"seconds": round(seconds, 1)} | report.as_dict())
    print(report.table())
    print(f"wrote {options.out}, {written}; {options.samples} samples, {seconds:.0f} s")


def _loaded(options: argparse.Namespace, of_texts: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, and what it draws as arguments `cfg` and `texts` of `calibrate` and `plan`."""
    if not of_texts:
        say_device(options)
        _, var = load(options, DTYPES[options.dtype])
        return var, {"cfg": strength_of(options), "texts": None}
    use_default_prompts(options)
    infinity, sampling = load_to_sample_texts(options, request_of_texts(options))
    return infinity, {"cfg": sampling.cfg, "texts": sampling.texts}


def _run_plan(options: argparse.Namespace, of_texts: bool, goal: Goal) -> None:
    """Write the adapter whose plan meets `goal`, its report and the whole curve; exit with code 1 if none does."""
    if options.rates or options.uniform:
        raise ValueError("--rates, --uniform: a plan finds the rates itself; give these or a goal")
    adapter = adapter_of(options, None)
    model, drawn = _loaded(options, of_texts)
    begin = time.perf_counter()
    report = plan(
        model,
        goal,
        None if options.levers is None else options.levers.split(","),
        adapter=adapter,
        num_experts=options.experts,
        batch=options.batch,
        images=options.samples,
        seed=options.seed,
        repeats=options.repeats,
        folder=options.out.with_suffix(".parts"),
        **drawn,
    )
    seconds = time.perf_counter() - begin
    print(report.describe())
    print(describe(report.chosen.config))
    report.save_curve(options.out.with_suffix(".csv"), options.out.with_suffix(".png"))
    place = {"device": options.device, "dtype": options.dtype, "batch": options.batch, "machine": processor()}
    if not report.is_met:
        print(f"no plan meets the goal; the nearest is above, and all are in {options.out.with_suffix('.csv')}")
        raise SystemExit(1)
    facts: dict[str, object] = {"plan": place | report.facts()}
    if adapter is not None:
        facts = {"training": read_adapter(adapter).training} | facts
    actvar.save_adapter(model, options.out, facts, report.chosen.execution)
    write_json(options.out.with_suffix(".json"), place | {"seconds": round(seconds, 1)} | report.as_dict())
    print(f"wrote {options.out}, and its report and curve as .json, .csv and .png; {seconds:.0f} s")
