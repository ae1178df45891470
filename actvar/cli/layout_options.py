"""Add the option for benchmarks of texts, and read its value."""

from __future__ import annotations

import argparse

from actvar.cli.infinity_options import first_given, is_infinity, schedule_of
from actvar.sampling.layouts import LAYOUTS, DPGBench, Layout, layout_of


def add_layout(command: argparse._ActionsContainer) -> None:
    """Add the option for the benchmark whose prompts are drawn."""
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="draw a benchmark's --prompts, a file or folder of its own, into the folders that its tools read",
    )


def asked_layout(options: argparse.Namespace) -> Layout | None:
    """Return the layout of --layout with the prompts of --prompts, or None without it.

    Raises:
        ValueError: options that do not go with it, or prompts that cannot be read.
    """
    if options.layout is None:
        return None
    if not is_infinity(options) or options.prompts is None:
        raise ValueError(f"--layout {options.layout}: expected --infinity, and the benchmark's prompts as --prompts")
    if given := first_given(options, ("prompt", "format", "npz")):
        raise ValueError(f"--layout {options.layout} says what is drawn and where it is kept; leave out {given}")
    _, height, width = schedule_of(options)[-1]
    if options.layout == DPGBench.name and height != width:
        raise ValueError("--layout dpg: expected --aspect 1:1, since DPG-Bench cuts squares out of its pictures")
    return layout_of(options.layout, options.prompts, options.num)
