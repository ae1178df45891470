"""Time the C++ kernels against plain PyTorch on this machine, by `actvar bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from actvar.cli.options import expect_file, write_json
from actvar.reports import here
from actvar_kernels.cpu_backend import choices
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to its parser."""
    command.add_argument("--json", type=Path, help="file to write all rows and the machine's name to")
    command.add_argument(
        "--out", type=Path, help=f"file to write a table of who runs what to, for {ENVIRONMENT_VARIABLE}"
    )


def run(options: argparse.Namespace) -> None:
    """Print a line per case and write the files, and exit with code 1 where the kernels are over 10 % slower."""
    expect_file("--json", options.json)
    expect_file("--out", options.out)
    todo, rows, machine = here.cases(), [], here.machine()
    if warning := here.warning(machine["load"]):
        print(warning)
    print(here.HEADER, flush=True)
    for row in here.measured(todo):
        rows.append(row)
        print(row.line(), flush=True)
    print(here.summary(rows, len(todo)))
    if options.json:
        write_json(options.json, {"machine": machine, "rows": [here.as_dict(row) for row in rows]})
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        choices.write_table(here.table_of(rows), options.out)
    if any(row.is_slower for row in rows):
        raise SystemExit(1)
