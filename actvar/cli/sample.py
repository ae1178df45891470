"""Sample images, few of given classes or many of all, by `actvar sample`."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from actvar.cli.options import (
    MOST_AT_ONCE,
    add_draw,
    add_dtype,
    add_source,
    at_once,
    check_source,
    class_name,
    describe,
    expect_file,
    expect_folder,
    labels_of,
    load_to_sample,
    of_process,
    positive,
    warn_without_adapter,
)
from actvar.models import VAR
from actvar.patching.patch import patched_silently
from actvar.reports.compare import compare, save_pictures
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk, sample_many, write_npz
from actvar.utils.pictures import save_grid


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `sample` to its parser."""
    add_source(command, "best")
    add_dtype(command)
    what = command.add_argument_group("images")
    what.add_argument("--labels", "--classes", type=labels_of, help="e.g. 0-9 or 207,980 (default for --num: all)")
    what.add_argument("--per-class", type=at_once, help="images per class (default 1)")
    add_draw(what)
    command.add_argument("--dense", action="store_true", help="sample without ActVAR")
    command.add_argument("--compare", action="store_true", help="dense and ActVAR with the same seed, side by side")
    command.add_argument("--repeats", type=positive, default=5, help="timed runs of each (default 5)")
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to (default samples)")
    many = command.add_argument_group(
        "many images; by 2 processes: torchrun --nproc-per-node 2 -m -- actvar sample ..."
    )
    many.add_argument("--num", type=positive, help="so many images of all classes together, as shards; resumes")
    many.add_argument("--batch", type=at_once, help="images per batch and shard (default 50)")
    many.add_argument("--npz", type=Path, help="file to write all of them to, shuffled, for OpenAI's evaluator")


def run(options: argparse.Namespace) -> None:
    """Sample images, and write them."""
    check_source(options)
    _check_images(options)
    sampling = Sampling(options.labels or (), options.cfg, options.top_k, options.top_p, options.seed)
    var, config, adapter = load_to_sample(options, sampling.labels, "--labels")
    if adapter is None and not options.dense:
        warn_without_adapter(config)
    if options.num:
        with contextlib.nullcontext() if options.dense else patched_silently(var, config, adapter):
            _sample_many(var, sampling, options)
        return
    per_class = options.per_class or 1
    labels = tuple(label for label in sampling.labels for _ in range(per_class))
    sampling = replace(sampling, labels=labels)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare:
        result = compare(var, config, adapter, sampling, options.repeats)
        titles = [class_name(options, label) for label in labels]
        written = save_pictures(var, config, adapter, sampling, options.out, per_class, titles)
        print(f"{len(labels)} images, cfg {options.cfg}, {options.dtype}, {torch.get_num_threads()} threads,", end=" ")
        print(f"median of {options.repeats}; {describe(config)}")
        print(result.table())
    elif options.dense:
        written = [save_grid(sampling.run(var), options.out / "dense.png", per_class)]
    else:
        with patched_silently(var, config, adapter):
            written = [save_grid(sampling.run(var), options.out / "actvar.png", per_class)]
    print("wrote " + ", ".join(str(path) for path in written))


def _check_images(options: argparse.Namespace) -> None:
    """Raise a ValueError if options of a few images and of many are mixed, or contradict each other."""
    expect_folder("--out", options.out)
    if options.dense and options.compare:
        raise ValueError("--dense samples without ActVAR; leave it out for --compare")
    if options.num:
        if options.compare or options.per_class:
            raise ValueError("--num draws shards; leave out --compare and --per-class")
        expect_file("--npz", options.npz)
    elif options.batch or options.npz:
        raise ValueError("--batch and --npz belong to --num, which draws many images")
    elif options.labels is None:
        raise ValueError("--labels: say which classes to draw, e.g. 0-9, or how many images of all of them with --num")
    elif len(options.labels) * (options.per_class or 1) > MOST_AT_ONCE:
        raise ValueError(f"--per-class: expected at most {MOST_AT_ONCE} images at once; draw more with --num")


def _sample_many(var: VAR, sampling: Sampling, options: argparse.Namespace) -> None:
    """Draw the shards of `--num` images as one of torchrun's processes, and write the file of `--npz`."""
    rank, processes = of_process("RANK", 0), of_process("WORLD_SIZE", 1)
    sampling = replace(sampling, labels=sampling.labels or tuple(range(var.num_classes)))
    bulk = Bulk(sampling, options.num, options.batch or 50)
    sample_many(var, bulk, options.out, rank, processes)
    if rank == 0:
        print(f"{options.num} images in {options.out}")
        if options.npz:
            write_npz(options.out, bulk, options.npz)
            print(f"wrote {options.npz}")
