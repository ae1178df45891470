"""Show a model dense, accelerated and by presets on a page, by `actvar demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

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
from actvar.reports.demo.drawing import Drawing
from actvar.reports.demo.page import HOST, PORT, serve
from actvar.zoo.pretrained import LOSSLESS, adapter_path, bundled_adapters, bundled_presets, preset_path


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `demo` to its parser."""
    add_source(command, "all that come with it")
    command.add_argument("--host", default=HOST, help=f"address to listen on (default {HOST}: this machine alone)")
    command.add_argument("--port", type=positive, default=PORT, help=f"port to listen on (default {PORT})")


def run(options: argparse.Namespace) -> None:
    """Load the model, and serve the page until Ctrl-C."""
    if options.model is None and options.var is None:
        options.model = "fashion-mnist"
    check_source(options)
    say_device(options)
    _, var = load(options, DTYPES[options.dtype])
    classes = [class_name(options, label) for label in range(var.num_classes)]
    drawing = Drawing(var, classes, adapters_of(options))
    print(f"the page is at http://{options.host}:{options.port}, until Ctrl-C", flush=True)
    serve(drawing, f"ActVAR: {options.model or Path(str(options.var)).name}", options.host, options.port)


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
