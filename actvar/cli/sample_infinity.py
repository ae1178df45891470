"""Read the options of `actvar sample` for Infinity, which draws images of texts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import actvar
from actvar.cli.infinity_options import (
    add_checkpoints,
    add_size,
    describe_size,
    expect_both,
    files_of,
    first_given,
    is_bundled,
    is_infinity,
    schedule_of,
)
from actvar.cli.options import DTYPES, MOST_AT_ONCE, device_of_process, number, of_process, say_device
from actvar.models import Infinity
from actvar.models.checkpoint import sizes_of_files
from actvar.sampling.layouts import Layout
from actvar.sampling.text_request import TextSampling
from actvar.text import DEFAULT_ENCODER, MOST_TOKENS, FeatureCache, default_folder, default_prompts
from actvar.text.words import WordEncoder
from actvar.zoo.fashion_mnist_text.architecture import DRAW, WIDE
from actvar.zoo.fashion_mnist_text.prompts import PAIRS, PROMPTS, schedule_of_prompts
from actvar.zoo.pretrained import TEXT_MODEL, load_text_encoder

OF_CLASSES = ("label", "labels", "per_class")
OF_OTHERS = ("model", "var", "vae", "preset")
"""Options for which --infinity takes the place, or which belong to bundled models."""
OF_TEXTS = ("tokenizer", "prompt", "prompts", "pn", "aspect", "tau", "text_encoder")


def add_infinity(command: argparse.ArgumentParser) -> None:
    """Add the options for Infinity to a command's parser."""
    texts = command.add_argument_group("Infinity: images of texts")
    add_checkpoints(texts)
    texts.add_argument("--prompt", action="append", help="a text, of which an image is drawn; give it for each image")
    texts.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt in each line")
    add_size(texts)
    texts.add_argument("--tau", type=number, help=f"temperature (default {TextSampling.tau}; the 8B model wants 1)")
    texts.add_argument(
        "--text-encoder",
        help=f"folder or name on the hub of the T5 that encodes prompts (default {DEFAULT_ENCODER}, a download of GBs)",
    )


def is_of_texts(options: argparse.Namespace) -> bool:
    """Return whether the options are about an Infinity.

    Raises:
        ValueError: options of Infinity without such a model, or beside options of VAR.
    """
    if not is_infinity(options):
        given = first_given(options, OF_TEXTS)
        if given:
            raise ValueError(
                f"{given}: expected --infinity, the checkpoint of a model of texts, or --model {TEXT_MODEL}, got none"
            )
        return False
    model = f"--model {TEXT_MODEL}" if is_bundled(options) else "--infinity"
    given = first_given(options, OF_CLASSES if is_bundled(options) else (*OF_OTHERS, *OF_CLASSES))
    if given:
        raise ValueError(f"{given} is not for {model}, which draws images of texts; leave it out")
    expect_both(options)
    return True


def request_of_texts(options: argparse.Namespace, at_once: bool = True, layout: Layout | None = None) -> TextSampling:
    """Return the request of the options, without features.

    With --num it has one seed, from which those of all images follow. Otherwise, and in commands without that option,
    every image has the seed of --seed, so it is that of a sample of its prompt alone.

    Args:
        options: of the command.
        at_once: whether the images of all prompts are drawn at once, without --num.
        layout: of a benchmark, whose prompts are drawn; None for those of the options.

    Raises:
        ValueError: no prompts, a file that has none, or numbers out of their range; prompts that the bundled model
            does not know, or that are not for the given aspect ratio.
    """
    prompts = _prompts(options) if layout is None else tuple(prompt.text for prompt in layout.prompts)
    if is_bundled(options):
        _take_aspect_of(options, prompts)
    num, seed = getattr(options, "num", None), getattr(options, "seed", 0)
    if at_once and not num and len(prompts) > MOST_AT_ONCE:
        raise ValueError(f"--prompts: expected at most {MOST_AT_ONCE} images at once; draw more with --num")
    given = {name: getattr(options, name, None) for name in ("cfg", "tau", "top_k", "top_p")}
    numbers: dict[str, Any] = dict(DRAW) if is_bundled(options) else {}
    numbers |= {name: value for name, value in given.items() if value is not None}
    return TextSampling(
        prompts,
        tuple(range(len(prompts))) if layout is None else layout.labels,
        schedule_of(options),
        seed=seed if num else (seed,) * len(prompts),
        **numbers,
    )


def load_to_sample_texts(
    options: argparse.Namespace, sampling: TextSampling, dtype: torch.dtype | None = None
) -> tuple[Infinity, TextSampling]:
    """Encode the prompts, then load the model, so that the device never has both.

    Args:
        options: of the command.
        sampling: the request.
        dtype: of the model; None for that of --dtype.

    Returns:
        the model, and the request with features.

    Raises:
        ValueError: a prompt with too many tokens, or an encoder whose features the model does not read.
    """
    say_device(options)
    if not options.quiet and of_process("RANK", 0) == 0:
        print(describe_size(options), flush=True)
    device, dtype = device_of_process(options), dtype or DTYPES[options.dtype]
    files = files_of(options)
    sizes = sizes_of_files(*files, options.key)
    encoder = encoder_of(options)
    text, lengths = encoder(sampling.prompts, min(sizes.text_maxlen, MOST_TOKENS))
    if text.shape[1] != sizes.text_channels:
        raise ValueError(
            f"--text-encoder: expected features of {sizes.text_channels} channels, as the model reads them, got "
            f"{text.shape[1]} by {encoder.name}"
        )
    features = text.cpu().split(lengths)
    del encoder, text
    _, infinity = actvar.load_infinity(*files, device, dtype, options.key)
    return infinity, replace(sampling, features=features)


def encoder_of(options: argparse.Namespace) -> WordEncoder | actvar.TextEncoder:
    """Return what turns prompts into features on the device: the words of the bundled model, or the T5 of the options.

    A T5 is loaded for the first prompt that its cache does not have.
    """
    device = device_of_process(options)
    if is_bundled(options):
        return load_text_encoder(device)
    return actvar.TextEncoder(options.text_encoder or DEFAULT_ENCODER, device, FeatureCache(default_folder()))


def title_of(sampling: TextSampling, label: int) -> str:
    """Return the start of a prompt for the title of a picture."""
    prompt = sampling.prompts[label]
    return prompt if len(prompt) <= 20 else f"{prompt[:17]}..."


def use_default_prompts(options: argparse.Namespace) -> None:
    """Take the prompts that come with the package, or those of the bundled model, where no others are given."""
    if options.prompt is None and options.prompts is None:
        of_model = PAIRS if schedule_of(options) == WIDE else PROMPTS
        options.prompt = of_model if is_bundled(options) else default_prompts()


def _take_aspect_of(options: argparse.Namespace, prompts: tuple[str, ...]) -> None:
    """Take the aspect ratio that the bundled model was trained with for such prompts, unless it is given."""
    schedule = schedule_of_prompts(prompts, load_text_encoder())
    _, height, width = schedule[-1]
    if options.aspect is None:
        options.aspect = (width / height, 1.0)
    elif schedule_of(options) != schedule:
        kind = "two garments" if schedule == WIDE else "one garment"
        given = ":".join(f"{side:g}" for side in options.aspect)
        raise ValueError(
            f"--aspect: expected {width / height:g}:1, since the model was trained with such images of {kind}, got "
            f"{given} with the prompt {prompts[0]!r:.100}; leave it out"
        )


def _prompts(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the prompts of --prompt, then those of --prompts."""
    prompts = list(options.prompt or ())
    if options.prompts is not None:
        try:
            lines = options.prompts.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts: expected a text file in UTF-8, got {options.prompts}: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--prompts: expected a prompt in each line of {options.prompts}, got an empty file")
        prompts += found
    if not prompts:
        raise ValueError(
            f"{'--model' if is_bundled(options) else '--infinity'}: say what to draw by --prompt TEXT, or by "
            "--prompts FILE with a prompt in each line"
        )
    return tuple(prompts)
