"""Make an adapter without training, by `actvar calibrate`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import actvar
from actvar.calibrate import calibrate
from actvar.cli.options import (
    DTYPES,
    add_dtype,
    add_source,
    at_once,
    check_source,
    expect_file,
    integer,
    load,
    number,
    positive,
    say_device,
    with_rates,
    write_json,
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `calibrate` to its parser."""
    add_source(command, adapter=None)
    add_dtype(command)
    command.add_argument(
        "--out", type=Path, required=True, help="adapter file to write; the report goes beside it as .json"
    )
    command.add_argument(
        "--rates",
        nargs="+",
        type=number,
        help="token rates of the last scales, then the FFN's (default 0.75 0.75 0.75)",
    )
    command.add_argument(
        "--uniform", action="store_true", help="these rates in every block, not the best at their FLOPs"
    )
    command.add_argument("--experts", type=positive, default=16, help="groups of hidden units (default 16)")
    command.add_argument("--images", type=at_once, default=16, help="samples to fit to (default 16)")
    command.add_argument("--cfg", type=number, default=1.5, help="guidance strength of the samples (default 1.5)")
    command.add_argument("--seed", type=integer, default=0, help="of the samples (default 0)")


def run(options: argparse.Namespace) -> None:
    """Fit an adapter to samples of the model, and write it with a report."""
    check_source(options)
    expect_file("--out", options.out)
    if options.out.suffix == ".json":
        raise ValueError(f"--out: expected the adapter's name, such as adapter.safetensors, got {options.out}")
    config = with_rates(actvar.ActVARConfig(num_experts=options.experts), options.rates)
    say_device(options)
    _, var = load(options, DTYPES[options.dtype])
    begin = time.perf_counter()
    report = calibrate(var, config, images=options.images, seed=options.seed, cfg=options.cfg, uniform=options.uniform)
    seconds = time.perf_counter() - begin
    actvar.save_adapter(var, options.out)
    facts = {"device": options.device, "images": options.images, "cfg": options.cfg, "seed": options.seed}
    written = options.out.with_suffix(".json")
    write_json(written, facts | {"seconds": round(seconds, 1)} | report.as_dict())
    print(report.table())
    print(f"wrote {options.out}, {written}; {options.images} samples, {seconds:.0f} s")
