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

from actvar.cli.options import sampler_of, usable_device, write_json
from actvar.cli.sample_infinity import load_to_sample_texts, request_of_texts, title_of, use_default_prompts
from actvar.reports.method_sheet import save_method_sheet
from actvar.utils.devices import device_of
from actvar.zoo.fashion_mnist_text.architecture import SQUARE

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
    use_default_prompts(options)
    sampling = replace(request_of_texts(options, at_once=False), seed=options.seed)
    batch = options.batch or 1
    device = usable_device(options.device)
    methods = chosen_methods(options.methods, text_methods(len(sampling.schedule), batch, options.model, device))
    how = TextEvaluation(
        sampling, options.num or len(sampling.prompts), options.seeds, batch, options.rounds, sampler_of(options)
    )
    infinity, sampling = load_to_sample_texts(options, sampling)
    how = replace(how, sampling=sampling)
    lite0, judges = _networks(options, how, device_of(infinity))
    results = evaluate_texts(infinity, methods, how, options.json.with_suffix(".parts"), lite0, judges)
    report = Report(results, how, sampling.maps(infinity))
    facts = {"model": options.model or Path(options.infinity).name, "device": options.device, "dtype": options.dtype}
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


def _networks(options: argparse.Namespace, how: Any, device: torch.device) -> tuple[Any, Any]:
    """Return the network of the distance, or None, and for single garments of the bundled model the judges by FID."""
    from actvar.evaluate.bundled import text_judges, training_lite0_quality
    from actvar.evaluate.lite0 import load_lite0
    from actvar.evaluate.quality import FEWEST_IMAGES

    is_judged = bool(options.model) and how.sampling.schedule == SQUARE and how.num >= FEWEST_IMAGES
    if options.model and not is_judged:
        logger.warning("FID is left out: expected at least %d images of one garment each", FEWEST_IMAGES)
    network = quality = None
    if options.lite0 or (options.lite0 is None and how.num > 1):
        try:
            quality = training_lite0_quality(options.data, device) if is_judged else None
            network = load_lite0().to(device) if quality is None else quality.network
        except ModuleNotFoundError as error:
            if options.lite0:
                raise
            logger.warning("the columns of Lite0 are left out: %s", error)
    return network, text_judges(options.data, quality, device) if is_judged else ()


def _save_picture(options: argparse.Namespace, infinity: nn.Module, methods: Any, how: Any) -> Path:
    """Write the first images of the first seed by every method, and return the file."""
    from actvar.evaluate.texts import shown_images

    rows = shown_images(infinity, methods, how, options.json.with_suffix(".parts"), SHOWN)
    count = len(next(iter(rows.values())))
    titles = [title_of(how.sampling, label) for label in how.first(count).labels]
    return save_method_sheet(options.picture, {name: list(images) for name, images in rows.items()}, titles)
