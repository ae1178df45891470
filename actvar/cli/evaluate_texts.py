"""Measure methods on Infinity, which draws images of texts, by `actvar evaluate`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actvar.cli.options import sampler_of, write_json
from actvar.cli.sample_infinity import load_to_sample_texts, request_of_texts, title_of
from actvar.reports.method_sheet import save_method_sheet
from actvar.utils.devices import device_of

logger = logging.getLogger(__name__)

SHOWN = 6
"""Images of a method in the picture."""


def run_texts(options: argparse.Namespace) -> None:
    """Measure the methods on a model of texts, and write and print the results."""
    for name in ("all_seeds", "npz_dir"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for models of texts; leave it out")
    with packages_named():
        from actvar.evaluate.methods import chosen_methods
        from actvar.evaluate.report import Report, save_quality_plot
        from actvar.evaluate.text_methods import text_methods
        from actvar.evaluate.texts import TextEvaluation, evaluate_texts
    sampling = replace(request_of_texts(options, at_once=False), seed=options.seed)
    batch = options.batch or 1
    methods = chosen_methods(options.methods, text_methods(len(sampling.schedule), batch))
    how = TextEvaluation(
        sampling, options.num or len(sampling.prompts), options.seeds, batch, options.rounds, sampler_of(options)
    )
    infinity, sampling = load_to_sample_texts(options, sampling)
    how = replace(how, sampling=sampling)
    lite0 = _lite0(options, how, infinity)
    parts = options.json.with_suffix(".parts")
    results = evaluate_texts(infinity, methods, how, parts, lite0)
    report = Report(results, how, sampling.maps(infinity))
    facts = {"model": options.model or options.infinity, "device": options.device, "dtype": options.dtype}
    write_json(options.json, facts | {"threads": torch.get_num_threads()} | report.as_dict())
    print(report.table())
    written = [options.json]
    if options.csv:
        written.append(report.save_csv(options.csv))
    if options.plot:
        written.append(save_quality_plot(report, options.plot))
    if options.picture:
        written.append(_save_picture(options, infinity, methods, how))
    print("wrote " + ", ".join(map(str, written)))


@contextmanager
def packages_named() -> Iterator[None]:
    """Name the extra with the packages of evaluation where one is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; install the packages of evaluation: pip install 'actvar[eval]'") from error


def _lite0(options: argparse.Namespace, how: Any, infinity: nn.Module) -> Any:
    """Return the network of the distance, or None without its weights, with one image, or by --no-lite0."""
    from actvar.evaluate.lite0 import load_lite0

    if options.lite0 is False or (options.lite0 is None and how.num < 2):
        return None
    try:
        return load_lite0().to(device_of(infinity))
    except ModuleNotFoundError as error:
        if options.lite0:
            raise
        logger.warning("distance_lite0 is left out: %s", error)
        return None


def _save_picture(options: argparse.Namespace, infinity: nn.Module, methods: Any, how: Any) -> Path:
    """Write the first images of the first seed by every method, and return the file."""
    from actvar.evaluate.texts import shown_images

    rows = shown_images(infinity, methods, how, options.json.with_suffix(".parts"), SHOWN)
    count = len(next(iter(rows.values())))
    titles = [title_of(how.sampling, label) for label in how.first(count).labels]
    return save_method_sheet(options.picture, {name: list(images) for name, images in rows.items()}, titles)
