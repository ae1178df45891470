"""Check a checkpoint, by `actvar verify`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from actvar.cli.options import (
    DTYPES,
    adapter_of,
    add_draw,
    add_rates,
    add_source,
    at_once,
    check_source,
    config_of,
    describe,
    expect_file,
    load,
    with_rates,
    write_json,
)
from actvar.sampling.request import Sampling
from actvar.verify.run import verify
from actvar_kernels.backend import BACKENDS


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `verify` to its parser."""
    source = add_source(command, dtype=False)
    source.add_argument("--dtype", nargs="+", choices=DTYPES, default=[], help="besides fp32, which is always checked")
    command.add_argument(
        "--backend", nargs="+", choices=sorted(set(BACKENDS) - {"auto"}), help="default: those that run on the device"
    )
    add_rates(command)
    add_draw(command, filters=False)
    command.add_argument("--batch", type=at_once, default=1, help="images per sample (default 1)")
    command.add_argument("--weights", choices=["int8"], help="also check the products of the blocks in eight bits")
    command.add_argument("--public-var", type=Path, help="clone of the public VAR code: its class must agree as well")
    command.add_argument("--json", type=Path, help="file to write every comparison to")


def run(options: argparse.Namespace) -> None:
    """Check the model on every backend, and exit with code 1 where anything differs."""
    check_source(options)
    expect_file("--json", options.json)
    adapter = adapter_of(options)
    config = with_rates(config_of(adapter), options.rates)
    sampling = Sampling((0,) * options.batch, options.cfg, seed=options.seed)
    dtypes = [DTYPES[name] for name in options.dtype]
    report = verify(
        lambda dtype: load(options, dtype)[1],
        config,
        adapter,
        sampling,
        dtypes,
        options.backend,
        options.public_var,
        int8=options.weights == "int8",
    )
    print(f"batch {options.batch} on {options.device}; {describe(config)}")
    print(report.table())
    print(report.summary())
    if options.json:
        facts = {"device": options.device, "batch": options.batch, "config": asdict(config)}
        write_json(options.json, facts | report.as_dict())
    if report.failures:
        raise SystemExit(1)
