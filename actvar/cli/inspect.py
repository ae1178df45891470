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
from actvar.cli.sample_infinity import add_infinity, is_of_texts, load_to_sample_texts, request_of_texts
from actvar.patching.patch import warn_untrained
from actvar.reports.inspection import inspect_sample, save_page


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `inspect` to its parser."""
    add_source(command)
    command.add_argument("--label", "--class", type=label_of, help="the image's class, e.g. 7")
    add_infinity(command)
    add_draw(command, texts=True)
    command.add_argument("--repeats", type=positive, default=5, help="timed runs of each way (default 5)")
    command.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default inspect.html)")


def run(options: argparse.Namespace) -> None:
    """Sample the image, and write the page about it."""
    of_texts = is_of_texts(options)
    expect_file("--out", options.out)
    if of_texts:
        prompt = request_of_texts(options)
        if len(prompt.prompts) != 1:
            raise ValueError(f"--prompt: expected one text, of the image to look at, got {len(prompt.prompts)}")
        var, sampling = load_to_sample_texts(options, prompt)
        title = prompt.prompts[0]
    else:
        check_source(options)
        if options.label is None:
            raise ValueError("--label: expected the class of the image to look at, got none")
        var, sampling = load_to_sample(
            options, request(options, numbered(options, (options.label,), "--label")), "--label"
        )
        title = class_name(options, sampling.labels[0])
    adapter = adapter_of(options)
    config = config_of(adapter)
    if adapter is None:
        warn_untrained(config, "run actvar calibrate first, then give its file as --adapter")
    inspection = inspect_sample(var, config, adapter, sampling, options.repeats)
    facts = (
        f"{options.model or Path(options.var or options.infinity).name}, {options.dtype}",
        adapter.name if adapter else "untrained gates: time and FLOPs are those of ActVAR, the image is not",
        describe(config),
        f"seed {options.seed}, guidance {sampling.cfg}, top-k {sampling.top_k}, top-p {sampling.top_p}",
        f"{options.device}, {torch.get_num_threads()} threads, actvar {actvar.__version__}, torch {torch.__version__}",
    )
    print(f"wrote {save_page(inspection, options.out, title, facts)}")
