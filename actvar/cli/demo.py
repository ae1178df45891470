"""Show a model dense, accelerated and by presets on a page, by `actvar demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from actvar.cli.infinity_options import DEFAULT_SIZE, is_bundled, is_infinity
from actvar.cli.options import (
    DTYPES,
    adapter_of,
    add_source,
    check_source,
    class_name,
    load,
    positive,
    say_device,
)
from actvar.cli.sample_infinity import add_infinity, encoder_of, is_of_texts, load_to_sample_texts, request_of_texts
from actvar.models.infinity.schedules import Schedule, scale_schedule
from actvar.reports.demo.drawing import Drawing
from actvar.reports.demo.page import HOST, PORT, serve
from actvar.reports.demo.subjects import Classes, Texts
from actvar.text import default_prompts
from actvar.text.words import WordEncoder
from actvar.zoo.fashion_mnist_text.prompts import schedule_of_prompts
from actvar.zoo.pretrained import LOSSLESS, adapter_path, bundled_adapters, bundled_presets, preset_path

ASPECTS = ("1:1", "5:4", "4:3", "3:2", "7:4", "2:1", "5:2", "3:1", "4:5", "3:4", "2:3", "4:7", "1:2", "2:5", "1:3")
"""Width by height of all templates of the published models."""
GARMENTS = ("a sandal", "a dark coat", "a bright pullover", "trousers", "a patterned bag")


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `demo` to its parser."""
    add_source(command, "all that come with it")
    add_infinity(command)
    command.add_argument("--host", default=HOST, help=f"address to listen on (default {HOST}: this machine alone)")
    command.add_argument("--port", type=positive, default=PORT, help=f"port to listen on (default {PORT})")


def run(options: argparse.Namespace) -> None:
    """Load the model, and serve the page until Ctrl-C."""
    if options.model is None and options.var is None and not is_infinity(options):
        options.model = "fashion-mnist"
    model, subject = _of_texts(options) if is_of_texts(options) else _of_classes(options)
    drawing = Drawing(model, subject, adapters_of(options))
    print(f"the page is at http://{options.host}:{options.port}, until Ctrl-C", flush=True)
    name = options.model or Path(str(options.var or options.infinity)).name
    serve(drawing, f"ActVAR: {name}", options.host, options.port)


def _of_classes(options: argparse.Namespace) -> tuple[nn.Module, Classes]:
    """Return a VAR, and its classes."""
    check_source(options)
    say_device(options)
    _, var = load(options, DTYPES[options.dtype])
    return var, Classes([class_name(options, label) for label in range(var.num_classes)])


def _of_texts(options: argparse.Namespace) -> tuple[nn.Module, Texts]:
    """Return an Infinity, and the prompts of the options, or some others, to begin with."""
    if options.prompt is None and options.prompts is None:
        options.prompt = GARMENTS if is_bundled(options) else default_prompts()[:1]
    infinity, first = load_to_sample_texts(options, request_of_texts(options))
    encoder, size = encoder_of(options), options.pn or DEFAULT_SIZE

    def template(prompts: Sequence[str], aspect: str) -> Schedule:
        width, height = map(int, aspect.split(":"))
        return scale_schedule(height / width, size)

    if isinstance(encoder, WordEncoder):
        return infinity, Texts(first, encoder, (), lambda prompts, _: schedule_of_prompts(prompts, encoder))
    begun = [aspect for aspect in ASPECTS if template((), aspect) == first.schedule]
    return infinity, Texts(first, encoder, list(dict.fromkeys([*begun, *ASPECTS])), template)


def adapters_of(options: argparse.Namespace) -> dict[str, Path | None]:
    """Return the files of the slider's stops by name: presets and adapters of --model, or --adapter."""
    stops: dict[str, Path | None] = {LOSSLESS: None}
    if options.model:
        stops |= {name: preset_path(options.model, name) for name in bundled_presets(options.model)}
        stops |= {name: adapter_path(options.model, name) for name in bundled_adapters(options.model)}
    given = adapter_of(options, None)
    if given and given not in stops.values():
        stops[given.stem] = given
    return stops
