"""Add the options for the size of Infinity's images, and read their values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

from actvar.models.checkpoint.files import PathLike
from actvar.models.infinity.schedules import SIZES, Schedule, scale_schedule
from actvar.zoo.fashion_mnist_text import architecture
from actvar.zoo.pretrained import TEXT_MODEL, checkpoints

TOKEN_PIXELS = 16
"""Pixels along each side of a token of the published models."""
DEFAULT_SIZE, DEFAULT_ASPECT = "1M", (1.0, 1.0)
OF_FILES = ("infinity", "tokenizer", "var", "vae", "key", "pn", "text_encoder")
_ASPECT = re.compile(r"(\d{1,5}(?:\.\d{1,5})?):(\d{1,5}(?:\.\d{1,5})?)")


def add_checkpoints(command: argparse._ActionsContainer) -> None:
    """Add the options for the files of Infinity and its tokenizer."""
    command.add_argument("--infinity", help="transformer checkpoint of Infinity, in the formats of --var")
    command.add_argument("--tokenizer", help="checkpoint of its tokenizer, in the same formats")


def add_size(command: argparse._ActionsContainer, default: str = DEFAULT_SIZE) -> None:
    """Add the options for the number of pixels and the aspect ratio; both are None unless they are given.

    Args:
        command: the command's parser.
        default: size of the images without --pn.
    """
    command.add_argument("--pn", choices=list(SIZES), help=f"pixels of an image (default {default})")
    command.add_argument(
        "--aspect",
        type=aspect,
        metavar="W:H",
        help="width by height; the nearest template is taken (default 1:1)",
    )


def aspect(text: str) -> tuple[float, float]:
    """Return width and height in an option's text, such as `16:9`."""
    match = _ASPECT.fullmatch(text)
    sides = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if 0 in sides:
        raise argparse.ArgumentTypeError(f"expected width and height such as 16:9, got {text!r:.100}")
    return sides


def is_bundled(options: argparse.Namespace) -> bool:
    """Return whether --model names the bundled model of texts."""
    return options.model == TEXT_MODEL


def is_infinity(options: argparse.Namespace) -> bool:
    """Return whether the options name a model of texts, bundled or by its checkpoint."""
    return is_bundled(options) or options.infinity is not None


def schedule_of(options: argparse.Namespace, default: str = DEFAULT_SIZE) -> Schedule:
    """Return the scale schedule of the options, of the size `default` without --pn."""
    width, height = options.aspect or DEFAULT_ASPECT
    if is_bundled(options):
        return architecture.nearest_schedule(height / width)
    return scale_schedule(height / width, options.pn or default)


def expect_both(options: argparse.Namespace) -> None:
    """Raise a ValueError if the checkpoint of Infinity is given without that of its tokenizer, or beside a bundled one.

    Options that choose among files or sizes are not for a bundled model.
    """
    if is_bundled(options):
        given = first_given(options, OF_FILES)
        if given:
            raise ValueError(f"{given} is not for --model {TEXT_MODEL}, which comes with its files; leave it out")
    elif options.tokenizer is None:
        raise ValueError("--infinity needs --tokenizer, the checkpoint of the tokenizer that it was trained with")


def files_of(options: argparse.Namespace) -> tuple[PathLike, PathLike]:
    """Return the files of the transformer and of the tokenizer that the options name."""
    return checkpoints(options.model) if is_bundled(options) else (options.infinity, options.tokenizer)


def first_given(options: argparse.Namespace, names: Sequence[str]) -> str | None:
    """Return the first option of `names` that is given, with its dashes."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(options, name, None) is not None), None)


def describe_size(options: argparse.Namespace, default: str = DEFAULT_SIZE) -> str:
    """Return a text about the size of the images, and the aspect ratio that it is nearest to."""
    schedule, (width, height) = schedule_of(options, default), options.aspect or DEFAULT_ASPECT
    _, h, w = schedule[-1]
    tokens = sum(map(math.prod, schedule))
    side = architecture.TOKEN_PIXELS if is_bundled(options) else TOKEN_PIXELS
    return (
        f"images of {w * side}x{h * side} pixels, the template nearest to {width:g}:{height:g}; "
        f"{tokens} tokens in {len(schedule)} scales"
    )
