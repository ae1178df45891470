"""Count FLOPs, by `actvar flops`."""

from __future__ import annotations

import argparse
from pathlib import Path

import actvar
from actvar.cli.options import add_rates, describe, expect_file, positive, with_rates, write_json
from actvar.reports.flops import AGREEMENT, MODEL_NAMES, flops_report, save_plot


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `flops` to its parser."""
    command.add_argument("--model", choices=MODEL_NAMES, required=True, help="an official size, or the bundled model")
    add_rates(command)
    command.add_argument("--batch", type=positive, default=1, help="images (default 1)")
    command.add_argument("--paper", action="store_true", help="also the savings of the paper's tables, row by row")
    command.add_argument("--json", type=Path, help="file to write every figure to")
    command.add_argument("--plot", type=Path, help="PNG file to draw FLOPs by module and step to")


def run(options: argparse.Namespace) -> None:
    """Count FLOPs by formula and by torch's counter, and exit with code 1 where they differ."""
    expect_file("--json", options.json)
    expect_file("--plot", options.plot)
    config = with_rates(actvar.ActVARConfig(), options.rates)
    report = flops_report(options.model, config, options.batch, options.paper)
    print(f"{options.model}, batch {options.batch}; {describe(config)}")
    print(report.text())
    if options.json:
        write_json(options.json, report.as_dict())
    if options.plot:
        save_plot(report, options.plot)
    if report.worst_difference > AGREEMENT:
        raise SystemExit(1)
