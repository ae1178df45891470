"""Run the commands of `actvar`, from `actvar sample` to `actvar info`.

Each command has a module with a function `add_to`, which adds its options, and a function `run`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import NoReturn

import torch

from actvar.cli import bench, calibrate, distill, evaluate, flops, info, inspect, sample, verify
from actvar.cli.streams import forgiving_streams
from actvar_kernels import BackendUnavailableError

COMMANDS = (sample, inspect, evaluate, distill, calibrate, verify, flops, bench, info)
OPTION_OF = {"g_seed": "seed", "num_experts": "experts", "token_rates": "rates", "ffn_rate": "rates"}
"""Names of options, without the dashes, for arguments of functions that have another name."""
OUT_OF_MEMORY = "expected less at a time than the memory has room for; give smaller numbers"


class _Parser(argparse.ArgumentParser):
    """Report errors in one line that says what to do, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the `actvar` command.

    The exit code is 0 if the work was done, even if the output could not be written. It is 1 if a check found a
    difference, 2 with one line on standard error if the work was not done, and 130 after Ctrl-C.

    Args:
        arguments: the words after `actvar`; None for those of the process.
    """
    with forgiving_streams():
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    """Parse `arguments`, and run the command that they name."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _Parser(prog="actvar", description="Sample pretrained VAR image generators faster with ActVAR.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailableError) as error:
        parser.exit(2, f"actvar {options.command}: {_in_words_of(options, ' '.join(str(error).split()))}\n")
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        parser.exit(2, f"actvar {options.command}: {OUT_OF_MEMORY} ({' '.join(str(error).split()) or 'MemoryError'})\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


def _in_words_of(options: argparse.Namespace, message: str) -> str:
    """Return `message` with the command's option in place of the argument that it begins with."""
    names, colon, rest = message.partition(": ")
    given = [OPTION_OF.get(name, name) for name in names.split(", ")]
    if not colon or not all(hasattr(options, name) for name in given):
        return message
    return ", ".join(dict.fromkeys(f"--{name.replace('_', '-')}" for name in given)) + colon + rest


def _is_about_memory(error: Exception) -> bool:
    """Return whether an error says that there is too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
