"""Write a page about one image, by `actvar inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import actvar
from actvar.cli.options import (
    adapter_of,
    add_draw,
    add_dtype,
    add_source,
    check_source,
    class_name,
    config_of,
    describe,
    expect_file,
    integer,
    load_to_sample,
    positive,
)
from actvar.patching.patch import warn_untrained
from actvar.reports.inspection import inspect_sample, save_page
from actvar.sampling.request import Sampling


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `inspect` to its parser."""
    add_source(command, "best")
    add_dtype(command)
    command.add_argument("--label", "--class", type=integer, required=True, help="the image's class, e.g. 7")
    add_draw(command)
    command.add_argument("--repeats", type=positive, default=5, help="timed runs of each way (default 5)")
    command.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default inspect.html)")


def run(options: argparse.Namespace) -> None:
    """Sample the image, and write the page about it."""
    check_source(options)
    expect_file("--out", options.out)
    sampling = Sampling((options.label,), options.cfg, options.top_k, options.top_p, options.seed)
    var = load_to_sample(options, sampling.labels, "--label")
    adapter = adapter_of(options, "best")
    config = config_of(adapter)
    if adapter is None:
        warn_untrained(config, "run actvar calibrate first, then give its file as --adapter")
    inspection = inspect_sample(var, config, adapter, sampling, options.repeats)
    facts = (
        f"{options.model or Path(options.var).name}, {options.dtype}",
        adapter.name if adapter else "untrained gates: time and FLOPs are those of ActVAR, the image is not",
        describe(config),
        f"seed {options.seed}, guidance {options.cfg}, top-k {options.top_k}, top-p {options.top_p}",
        f"{options.device}, {torch.get_num_threads()} threads, actvar {actvar.__version__}, torch {torch.__version__}",
    )
    print(f"wrote {save_page(inspection, options.out, class_name(options, options.label), facts)}")
