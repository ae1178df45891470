"""Run the commands of `actvar`, such as `actvar sample`.

Each command has a module of its name with a function `add_options`, which adds its options to its parser, and a
function `run`. The module is imported only for its command, since torch takes seconds.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from importlib import import_module
from typing import NoReturn

from actvar import __version__
from actvar.cli.streams import forgiving_streams

COMMANDS = {
    "sample": "sample images; --compare also times dense against ActVAR",
    "demo": "a page to draw with: dense, accelerated and presets side by side",
    "inspect": "one image from inside, as an HTML page: scales, tokens, experts, cost",
    "evaluate": "quality, time and FLOPs of ActVAR beside other methods; resumes",
    "distill": "train an adapter; run the same command again to go on with it",
    "calibrate": "make an adapter without data or training, in minutes",
    "push": "upload an adapter to the hub, with a model card of what it does here",
    "verify": "check a checkpoint with ActVAR; exit code 1 if anything differs",
    "flops": "FLOPs by module and step; exit code 1 if torch counts other ones",
    "bench": "time the C++ kernels against plain PyTorch on this CPU; exit code 1 if any is over a tenth slower",
    "models": "list the models that come with the package, with their presets and adapters",
    "info": "describe a checkpoint or adapter, or, without a file, this installation",
}
"""Purpose of each command, by its name."""
OPTION_OF = {
    "g_seed": "seed",
    "images": "samples",
    "num_experts": "experts",
    "token_rates": "rates",
    "ffn_rate": "rates",
}
"""Names of options, without the dashes, for arguments of functions that have another name."""
OUT_OF_MEMORY = "expected less at a time than the memory has room for; give smaller numbers"


class _Parser(argparse.ArgumentParser):
    """Report errors in one line that says what to do, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


class _CommandParser(_Parser):
    """Read the options of a command, whose module is imported when the command is given."""

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Import the command's module, add its options and --quiet, and read them."""
        command = import_module(f"actvar.cli.{self.prog.split()[-1]}")
        command.add_options(self)
        self.add_argument("--quiet", action="store_true", help="no progress bars, and no line about the device")
        self.set_defaults(run=command.run)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(arguments: list[str] | None = None) -> None:
    """Run the `actvar` command.

    The exit code is 0 if the work was done, even if the output could not be written. It is 1 if a check found a
    difference, 2 with one line on standard error if the work was not done, and 130 after Ctrl-C.

    Args:
        arguments: the words after `actvar`; None for those of the process.
    """
    with forgiving_streams():
        try:
            _run(arguments)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise SystemExit(130) from None


def top_parser() -> argparse.ArgumentParser:
    """Return the parser of `actvar`, which knows its commands by name alone until one is given."""
    parser = _Parser(prog="actvar", description="Sample pretrained VAR image generators faster with ActVAR.")
    parser.add_argument("--version", "-V", action="version", version=f"actvar {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_CommandParser)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    return parser


def _run(arguments: list[str] | None) -> None:
    """Parse `arguments`, and run the command that they name, or print the help where they name none."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = top_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    from actvar.utils.progress import quiet  # imported late, as the commands are

    try:
        with quiet() if options.quiet else nullcontext():
            options.run(options)
        sys.stdout.flush()
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.exit(2, f"actvar {options.command}: {_in_words_of(options, _in_one_line(error))}\n")
    except (MemoryError, RuntimeError) as error:
        parser.exit(2, f"actvar {options.command}: {_about_a_lack(error)}\n")


def _about_a_lack(error: Exception) -> str:
    """Return one line about a lack of memory or of a backend; raise any other error again."""
    # Imported late, as the commands are. A command that raised such an error has imported torch already.
    from torch import OutOfMemoryError

    from actvar_kernels import BackendUnavailableError

    if isinstance(error, BackendUnavailableError):
        return _in_one_line(error)
    if isinstance(error, MemoryError | OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"{OUT_OF_MEMORY} ({_in_one_line(error) or 'MemoryError'})"
    raise error


def _in_one_line(error: Exception) -> str:
    """Return the message of an error with spaces in place of line breaks."""
    return " ".join(str(error).split())


def _in_words_of(options: argparse.Namespace, message: str) -> str:
    """Return `message` with the command's option in place of the argument that it begins with."""
    names, colon, rest = message.partition(": ")
    given = [OPTION_OF.get(name, name) for name in names.split(", ")]
    if not colon or not all(hasattr(options, name) for name in given):
        return message
    return ", ".join(dict.fromkeys(f"--{name.replace('_', '-')}" for name in given)) + colon + rest
