"""The command line: `actvar sample`, `inspect`, `evaluate`, `distill`, `calibrate`, `verify`, `flops`, `info`; a module
each, with the command's options and what it does."""

from __future__ import annotations

import argparse
import logging

from actvar.cli import calibrate, distill, evaluate, flops, info, inspect, sample, verify
from actvar_kernels import BackendUnavailableError

COMMANDS = (sample, inspect, evaluate, distill, calibrate, verify, flops, info)


class _Parser(argparse.ArgumentParser):
    """Errors are one line that says what to do, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `actvar` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _Parser(prog="actvar", description="Sample pretrained VAR image generators faster with ActVAR.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailableError) as error:
        parser.exit(2, f"actvar {options.command}: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
