"""Write a page about one image, by `actvar inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import actvar
from actvar.cli.options import (
    adapter_of,
    add_draw,
    add_source,
    check_source,
    class_name,
    config_of,
    describe,
    expect_file,
    label_of,
    load_to_sample,
    numbered,
    positive,
    request,
)
from actvar.patching.patch import warn_untrained
from actvar.reports.inspection import inspect_sample, save_page


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `inspect` to its parser."""
    add_source(command)
    command.add_argument("--label", "--class", type=label_of, required=True, help="the image's class, e.g. 7")
    add_draw(command)
    command.add_argument("--repeats", type=positive, default=5, help="timed runs of each way (default 5)")
    command.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default inspect.html)")


def run(options: argparse.Namespace) -> None:
    """Sample the image, and write the page about it."""
    check_source(options)
    expect_file("--out", options.out)
    sampling = request(options, numbered(options, (options.label,), "--label"))
    var, sampling = load_to_sample(options, sampling, "--label")
    adapter = adapter_of(options)
    config = config_of(adapter)
    if adapter is None:
        warn_untrained(config, "run actvar calibrate first, then give its file as --adapter")
    inspection = inspect_sample(var, config, adapter, sampling, options.repeats)
    facts = (
        f"{options.model or Path(options.var).name}, {options.dtype}",
        adapter.name if adapter else "untrained gates: time and FLOPs are those of ActVAR, the image is not",
        describe(config),
        f"seed {options.seed}, guidance {sampling.cfg}, top-k {sampling.top_k}, top-p {sampling.top_p}",
        f"{options.device}, {torch.get_num_threads()} threads, actvar {actvar.__version__}, torch {torch.__version__}",
    )
    print(f"wrote {save_page(inspection, options.out, class_name(options, sampling.labels[0]), facts)}")
