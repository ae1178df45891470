"""Measure quality, time and FLOPs of methods, by `actvar evaluate`."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from actvar.cli.evaluate_texts import packages_named, run_texts
from actvar.cli.options import (
    DTYPES,
    add_draw,
    add_source,
    at_once,
    check_source,
    expect_file,
    expect_folder,
    filters_of,
    load,
    positive,
    sampler_of,
    say_device,
    strength_of,
    write_json,
)
from actvar.cli.sample_infinity import add_infinity, is_of_texts
from actvar.execution import SAMPLERS
from actvar.models.checkpoint import usable_device
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER

logger = logging.getLogger(__name__)

NUM, BATCH = 5000, 50


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate` to its parser."""
    add_source(command, adapter=None)
    add_infinity(command)
    command.add_argument(
        "--methods",
        default="all",
        help="comma-separated names, or files of adapters (default all); unknown: lists them",
    )
    command.add_argument(
        "--num", type=positive, help=f"images per method and seed (default {NUM}; with --infinity one per prompt)"
    )
    command.add_argument("--seeds", type=positive, default=1, help="how many seeds, from --seed on (default 1)")
    command.add_argument(
        "--all-seeds",
        help="methods that are drawn with all --seeds, the others with the first one (default: all methods)",
    )
    command.add_argument(
        "--batch", type=at_once, help=f"images per batch (default {BATCH}; with --infinity 1, as SkipVAR needs it)"
    )
    command.add_argument("--rounds", type=positive, default=5, help="timed batches of each method, in turn (default 5)")
    add_draw(command, texts=True)
    command.add_argument(
        "--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's files, for --model"
    )
    command.add_argument(
        "--json", type=Path, default=Path("evaluation.json"), help="file to write; finished parts go beside it"
    )
    command.add_argument(
        "--lite0",
        action=argparse.BooleanOptionalAction,
        help="FID and distance from the dense images by EfficientNet-Lite0 (default: if its weights are installed)",
    )
    command.add_argument("--csv", type=Path, help="CSV file to write a row per method to")
    command.add_argument("--plot", type=Path, help="PNG file to draw quality over time to")
    command.add_argument(
        "--picture", type=Path, help="PNG file to draw the first images to, a row per method; for --infinity"
    )
    command.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="how all methods draw tokens (default fast on a GPU, otherwise as an adapter recommends, or as the public "
        "code)",
    )
    command.add_argument("--npz-dir", type=Path, help="folder for the images of each method, for OpenAI's evaluator")


def run(options: argparse.Namespace) -> None:
    """Measure the methods, and write and print the results."""
    of_texts = is_of_texts(options)
    if not of_texts:
        check_source(options)
    for name in ("json", "csv", "plot", "picture"):
        expect_file(f"--{name}", getattr(options, name))
    expect_folder("--npz-dir", options.npz_dir)
    if of_texts:
        run_texts(options)
        return
    if options.picture:
        raise ValueError("--picture: expected --infinity; actvar sample --compare sets images of classes side by side")
    if options.plot and not options.model:
        raise ValueError("--plot: quality is measured of the bundled model; of others --npz-dir writes the images")
    if options.lite0 and not options.model:
        raise ValueError("--lite0: quality is measured of the bundled model; of others --npz-dir writes the images")
    with packages_named():
        from actvar.evaluate.bundled import dense_predictions, training_image_quality, training_lite0_quality
        from actvar.evaluate.methods import chosen_methods, methods_of
        from actvar.evaluate.report import Report, save_quality_plot
        from actvar.evaluate.run import Evaluation, evaluate, write_samples
        from actvar.families import family_of
        from actvar.utils.devices import device_of
    how = Evaluation(
        num=options.num or NUM,
        seed=options.seed,
        repeats=options.seeds,
        batch=options.batch or BATCH,
        cfg=strength_of(options),
        top_k=options.top_k or 0,
        top_p=options.top_p or 0.0,
        rounds=options.rounds,
        sampler=sampler_of(options),
    )
    say_device(options)
    vae, var = load(options, DTYPES[options.dtype])
    how = replace(how, **filters_of(options, var))
    placement = dict(device=usable_device(options.device), dtype=DTYPES[options.dtype])
    known = methods_of(options.model, **placement)
    methods = chosen_methods(options.methods, known)
    repeated = None
    if options.all_seeds:
        repeated = {method.name for method in chosen_methods(options.all_seeds, known)}
        if left := sorted(repeated - {method.name for method in methods}):
            raise ValueError(f"--all-seeds: expected some of --methods, got {', '.join(left)}")
    quality = dense = lite0 = None
    how.bulk(var, options.seed)  # reports wrong numbers before anything is read
    if options.model:
        try:
            lite0 = None if options.lite0 is False else training_lite0_quality(options.data, device_of(var))
        except ModuleNotFoundError as error:
            if options.lite0:
                raise
            logger.warning("fid_lite0 and distance_lite0 are left out: %s", error)
        quality = training_image_quality(options.data, device_of(var))
        dense = dense_predictions(vae, var, options.data, how.cfg)
    results = evaluate(var, methods, how, options.json.with_suffix(".parts"), quality, dense, lite0, repeated)
    report = Report(results, how, family_of(var).maps(var))
    facts = {"model": options.model or Path(options.var).name, "device": options.device, "dtype": options.dtype}
    write_json(options.json, facts | {"threads": torch.get_num_threads()} | report.as_dict())
    print(report.table())
    written = [options.json]
    if options.csv:
        written.append(report.save_csv(options.csv))
    if options.plot:
        written.append(save_quality_plot(report, options.plot))
    if options.npz_dir:
        written += write_samples(var, methods, how, options.npz_dir)
    print("wrote " + ", ".join(map(str, written)))
