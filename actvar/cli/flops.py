"""Count FLOPs, by `actvar flops`."""

from __future__ import annotations

import argparse
from pathlib import Path

import actvar
from actvar.cli.infinity_options import add_size, describe_size, first_given, is_bundled, schedule_of
from actvar.cli.options import add_rates, describe, expect_file, integer, positive, with_rates, write_json
from actvar.reports.flops import AGREEMENT, MODEL_NAMES, FlopsReport, flops_report, save_plot
from actvar.reports.infinity import INFINITY_NAMES, infinity_report

TEXT_TOKENS, BUNDLED_TEXT_TOKENS = 64, 4
"""Tokens of each text unless something else is asked for, of the published models and of the bundled one."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `flops` to its parser."""
    names = (*MODEL_NAMES, *INFINITY_NAMES)
    command.add_argument("--model", choices=names, required=True, help="an official size, or a bundled model")
    add_rates(command)
    command.add_argument(
        "--guidance-until", type=integer, help="first scale without guidance, e.g. -2 for the last two without"
    )
    command.add_argument("--batch", type=positive, default=1, help="images (default 1)")
    command.add_argument("--paper", action="store_true", help="also the savings of the paper's tables, row by row")
    infinity = command.add_argument_group("models of texts")
    add_size(infinity)
    infinity.add_argument(
        "--text-tokens",
        type=positive,
        help=f"tokens of each text (default {TEXT_TOKENS}; bundled {BUNDLED_TEXT_TOKENS})",
    )
    command.add_argument("--json", type=Path, help="file to write every figure to")
    command.add_argument("--plot", type=Path, help="PNG file to draw FLOPs by module and step to")


def run(options: argparse.Namespace) -> None:
    """Count FLOPs by formula and by torch's counter, and exit with code 1 where they differ."""
    expect_file("--json", options.json)
    expect_file("--plot", options.plot)
    config = with_rates(actvar.ActVARConfig(guidance_until=options.guidance_until), options.rates)
    report = _report(options, config)
    print(f"{options.model}, batch {options.batch}; {describe(config)}")
    if options.model in INFINITY_NAMES:
        print(f"{describe_size(options)}; texts of {_text_tokens(options)} tokens")
    print(report.text())
    if options.json:
        write_json(options.json, report.as_dict())
    if options.plot:
        save_plot(report, options.plot)
    if report.worst_difference > AGREEMENT:
        raise SystemExit(1)


def _report(options: argparse.Namespace, config: actvar.ActVARConfig) -> FlopsReport:
    """Return the report of the model that is named."""
    if options.model not in INFINITY_NAMES:
        given = first_given(options, ("pn", "aspect", "text_tokens"))
        if given:
            raise ValueError(f"{given} belongs to {' and '.join(INFINITY_NAMES)}; leave it out")
        return flops_report(options.model, config, options.batch, options.paper)
    if options.paper:
        raise ValueError("--paper: expected a model of VAR, which the paper's tables are about; leave it out")
    if is_bundled(options) and options.pn:
        raise ValueError(f"--pn: {options.model} has one size; leave it out")
    return infinity_report(options.model, config, options.batch, schedule_of(options), _text_tokens(options))


def _text_tokens(options: argparse.Namespace) -> int:
    """Return the number of tokens of each text."""
    return options.text_tokens or (BUNDLED_TEXT_TOKENS if is_bundled(options) else TEXT_TOKENS)
