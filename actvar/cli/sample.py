"""Sample images, few of given classes or texts or many of all, by `actvar sample`."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actvar.cli.infinity_options import is_infinity
from actvar.cli.layout_options import add_layout, asked_layout
from actvar.cli.options import (
    DTYPES,
    MOST_AT_ONCE,
    adapter_of,
    add_draw,
    add_rates,
    add_source,
    at_once,
    check_source,
    class_name,
    config_of,
    describe,
    expect_file,
    expect_folder,
    labels_of,
    load_to_sample,
    numbered,
    of_process,
    positive,
    request,
    sampler_of,
    with_rates,
    write_json,
)
from actvar.cli.sample_infinity import (
    add_infinity,
    is_of_texts,
    load_to_sample_texts,
    request_of_texts,
    title_of,
)
from actvar.config import DENSE, ActVARConfig
from actvar.execution import SAMPLERS, Execution
from actvar.patching.adapter import describe_adapter
from actvar.patching.patch import patched_silently
from actvar.reports.compare import compare, first_samples, save_comparison
from actvar.sampling.layouts import Layout
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk, sample_many, write_npz
from actvar.sampling.summary import summary
from actvar.sampling.text_request import TextSampling
from actvar.sparse.state import is_patched, patch_state
from actvar.utils.devices import is_on_gpu
from actvar.utils.pictures import save_images
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.pretrained import LOSSLESS, bundled_presets, preset_path
from actvar_kernels.constants import FORMATS

AnySampling = Sampling | TextSampling
FEWEST_ROWS = 1024
"""Kept rows of a scale from which on sparsity pays on a GPU: on an H100 384 rows lost time, and 2,032 gained some."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `sample` to its parser."""
    add_source(command, "the preset near")
    add_infinity(command)
    what = command.add_argument_group("images")
    what.add_argument(
        "--labels", "--classes", type=labels_of, help="e.g. 0-9 or 207,980, or names (default for --num, --model: all)"
    )
    what.add_argument("--per-class", type=at_once, help="images per class (default 1)")
    add_draw(what, texts=True)
    what.add_argument(
        "--format", choices=["png"], help="a PNG per image in its own size, in place of one grid or of --num's shards"
    )
    ways = command.add_argument_group("way of sampling (default: --preset near, or --accelerate without presets)")
    way = ways.add_mutually_exclusive_group()
    way.add_argument("--dense", action="store_true", help="sample without ActVAR, by PyTorch")
    way.add_argument("--accelerate", action="store_true", help="the dense model's images, on the kernels; no adapter")
    way.add_argument(
        "--compare", action="store_true", help="dense and ActVAR with the same seed: pictures, then a table of times"
    )
    ways.add_argument(
        "--repeats",
        type=positive,
        default=1,
        help="timed runs of each way for --compare, after the one that draws the pictures; their median is shown "
        "(default 1, the soonest to end; 5 for steadier times)",
    )
    ways.add_argument(
        "--preset",
        help="a quality of --model in place of an adapter: lossless draws the dense images on the kernels; unknown: "
        "lists them",
    )
    add_rates(ways)
    how = command.add_argument_group("execution, for ActVAR and --accelerate (default: what the adapter recommends)")
    how.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="how tokens are drawn, with --compare by all ways; fast: in one kernel, other images (default on a GPU, "
        "where a sample is a CUDA graph then); torch: as the public code",
    )
    how.add_argument(
        "--decoder-dtype",
        choices=[name for name, dtype in DTYPES.items() if dtype != torch.float32],
        help="decode images in half precision, which changes them slightly",
    )
    how.add_argument(
        "--weights", choices=list(FORMATS), help="multiply in eight bits in the blocks, which changes images slightly"
    )
    command.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to (default samples)")
    command.add_argument(
        "--json", type=Path, help="file to write what is printed to: seconds, and with --compare FLOPs, PSNR and SSIM"
    )
    many = command.add_argument_group(
        "many images; by 2 processes: torchrun --nproc-per-node 2 -m -- actvar sample ..."
    )
    many.add_argument("--num", type=positive, help="so many images of all classes or prompts together; resumes")
    many.add_argument("--batch", type=at_once, help="images per batch and shard (default 50; with --infinity 1)")
    add_layout(many)
    many.add_argument("--npz", type=Path, help="file to write all of them to, shuffled, for OpenAI's evaluator")


def run(options: argparse.Namespace) -> None:
    """Sample images, and write them."""
    of_texts = is_of_texts(options)
    if not of_texts:
        check_source(options)
    layout = asked_layout(options)
    if layout is not None:
        options.num = len(layout.labels)
    _check_images(options)
    sampling = request_of_texts(options, layout=layout) if of_texts else request(options, _labels(options))
    config, adapter = _patch(options)
    execution = _execution(options, adapter)
    if isinstance(sampling, TextSampling):
        var, sampling = load_to_sample_texts(options, sampling)
    else:
        var, sampling = load_to_sample(options, sampling, "--labels")
    if options.num:
        with _sampled_as_asked(options, var, config, adapter, execution):
            _sample_many(var, sampling, options, layout)
        return
    per_class = options.per_class or 1
    sampling = replace(sampling, labels=tuple(label for label in sampling.labels for _ in range(per_class)))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare:
        facts = _compare(var, config, adapter, sampling, execution, options)
    else:
        with _sampled_as_asked(options, var, config, adapter, execution):
            facts = _sample(var, config, sampling, options)
    if options.json:
        write_json(options.json, facts)


def _sample(
    var: nn.Module, config: ActVARConfig, sampling: AnySampling, options: argparse.Namespace
) -> dict[str, object]:
    """Sample `var` as it is, write the images, say how they were sampled, and return what is said."""
    begin = time.perf_counter()
    images = sampling.run(var)
    seconds = time.perf_counter() - begin
    name = "dense" if options.dense else "accelerated" if config is DENSE else "actvar"
    files = save_images(images, options.out, name, options.per_class or 1, _are_single(options))
    _say_written(files)
    text = summary(var)
    if not options.quiet:
        print(f"{len(images)} images in {seconds:.2f} s, the first ones of this process")
        print(text)
        for line in _faster_dense(var, len(images)):
            print(line)
    return {"images": len(images), "seconds": seconds, "summary": text.splitlines(), "files": list(map(str, files))}


def _faster_dense(var: nn.Module, images: int) -> Iterator[str]:
    """Yield a line where the dense model draws as many images in less time: with few rows on a GPU."""
    if not is_patched(var) or not is_on_gpu(var):
        return
    kept = [scale.keep for schedule in patch_state(var).schedules for scale in schedule if scale.active]
    if kept and 2 * images * max(kept) < FEWEST_ROWS:
        yield f"{images} images at once are few for a GPU: the dense model takes less time here (--accelerate)"


def _compare(
    var: nn.Module,
    config: ActVARConfig,
    adapter: Path | None,
    sampling: AnySampling,
    execution: Execution | None,
    options: argparse.Namespace,
) -> dict[str, object]:
    """Draw the images dense and with ActVAR, write them, print a table of times, and return what is printed."""
    labels, single = sampling.labels, _are_single(options)
    if isinstance(sampling, TextSampling):
        titles = [title_of(sampling, label) for label in labels]
    else:
        titles = [class_name(options, label) for label in labels]
    with patched_silently(var, config, adapter, execution):
        first = first_samples(var, sampling)
        files = save_comparison(first, options.out, options.per_class or 1, titles, single)
        _say_written(files)
        result = compare(var, sampling, first, options.repeats)
    threads = torch.get_num_threads()
    described = "no adapter" if config is DENSE else describe(config)
    print(f"{len(labels)} images, cfg {sampling.cfg}, {options.dtype}, {threads} threads,", end=" ")
    print(f"median of {options.repeats}; {described}")
    print(result.table())
    facts = {"cfg": sampling.cfg, "dtype": options.dtype, "threads": threads, "repeats": options.repeats}
    return facts | {"config": described} | result.as_dict() | {"files": list(map(str, files))}


def _are_single(options: argparse.Namespace) -> bool:
    """Return whether each image is a file of its own, as those of a checkpoint of texts are."""
    return options.format is not None or options.infinity is not None


def _labels(options: argparse.Namespace) -> tuple[int, ...]:
    """Return the classes of --labels, or without it one image of each class of a bundled model."""
    if options.labels is None:
        return tuple(range(len(CLASSES))) if options.model and not options.num else ()
    return numbered(options, options.labels, "--labels")


def _say_written(files: list[Path]) -> None:
    """Print the names of files at once, since what comes next may take long."""
    print("wrote " + ", ".join(map(str, files)), flush=True)


def _sampled_as_asked(
    options: argparse.Namespace, var: nn.Module, config: ActVARConfig, adapter: Path | None, execution: Execution | None
) -> AbstractContextManager[nn.Module | None]:
    """Return a context in which `var` samples without a patch for --dense, otherwise with `config` and `adapter`."""
    if options.dense:
        return contextlib.nullcontext()
    return patched_silently(var, config, adapter, execution)


def _patch(options: argparse.Namespace) -> tuple[ActVARConfig, Path | None]:
    """Return the configuration and the adapter of the options, which are `DENSE` and None for the dense images."""
    preset = options.preset
    if preset is None and not (options.adapter or options.rates):
        preset = "near" if options.model and "near" in bundled_presets(options.model) else LOSSLESS
    if options.accelerate or preset == LOSSLESS:
        return DENSE, None
    if preset is not None:
        adapter = preset_path(options.model, preset)
    else:
        adapter = adapter_of(options, "best")
    return with_rates(config_of(adapter), options.rates), adapter


def _execution(options: argparse.Namespace, adapter: Path | None) -> Execution | None:
    """Return the Execution of the options, beside what the adapter recommends; None where no option is given."""
    given: dict[str, str] = {}
    sampler = sampler_of(options)
    if sampler:
        given["sampler"] = sampler
    if options.decoder_dtype:
        given["decoder_dtype"] = str(DTYPES[options.decoder_dtype]).removeprefix("torch.")
    if options.weights:
        given["weights"] = options.weights
    if not given:
        return None
    recommended = None if adapter is None else describe_adapter(adapter)["execution"]
    return replace(recommended if isinstance(recommended, Execution) else Execution(), **given)


def _check_images(options: argparse.Namespace) -> None:
    """Raise a ValueError if options of a few images and of many are mixed, or contradict each other."""
    expect_folder("--out", options.out)
    expect_file("--json", options.json)
    _check_way(options)
    if options.num:
        if options.compare or options.per_class:
            raise ValueError("--num draws many images; leave out --compare and --per-class")
        if options.json:
            raise ValueError("--json: expected it without --num, whose settings are in manifest.json")
        expect_file("--npz", options.npz)
    elif options.batch or options.npz:
        raise ValueError("--batch and --npz belong to --num, which draws many images")
    elif is_infinity(options):
        return
    elif options.labels is None and not options.model:
        raise ValueError("--labels: say which classes to draw, e.g. 0-9, or how many images of all of them with --num")
    elif len(_labels(options)) * (options.per_class or 1) > MOST_AT_ONCE:
        raise ValueError(f"--per-class: expected at most {MOST_AT_ONCE} images at once; draw more with --num")


def _check_way(options: argparse.Namespace) -> None:
    """Raise a ValueError if options of ActVAR or of the kernels are given for a way of sampling without them."""
    if options.preset is not None:
        _check_preset(options)
    if options.dense and (options.sampler or options.decoder_dtype or options.weights):
        raise ValueError(
            "--dense samples by PyTorch; for --sampler, --decoder-dtype and --weights give --accelerate instead"
        )
    for way in ("accelerate", "dense"):
        if options.adapter and getattr(options, way):
            raise ValueError(f"--{way} draws the dense model's images; leave it out for --adapter")
    if options.rates and (options.dense or options.accelerate):
        raise ValueError("--rates: expected neither --dense nor --accelerate, which compute all tokens and experts")
    if options.rates and adapter_of(options, "best") is None:
        raise ValueError(
            "--rates: expected an adapter, whose selectors and routers choose so many tokens and experts, got none; "
            "run actvar calibrate, and give its file as --adapter"
        )


def _check_preset(options: argparse.Namespace) -> None:
    """Raise a ValueError unless --preset is given with --model, and without an option that it takes the place of."""
    if not options.model:
        raise ValueError(
            "--preset: presets belong to bundled models, expected --model, got --var; for a checkpoint of your own run "
            "actvar calibrate, and give its file as --adapter"
        )
    for name in ("adapter", "accelerate", "dense", "rates"):
        if getattr(options, name):
            raise ValueError(f"--preset fixes what is computed; leave out --{name}, or leave out --preset")


def _sample_many(var: Any, sampling: AnySampling, options: argparse.Namespace, layout: Layout | None) -> None:
    """Draw the `--num` images as one of torchrun's processes, and write the files of `--npz` or of a layout."""
    rank, processes = of_process("RANK", 0), of_process("WORLD_SIZE", 1)
    sampling = replace(sampling, labels=sampling.labels or tuple(range(var.num_classes)))
    batch = options.batch or (1 if options.infinity else 50)
    bulk = Bulk(sampling, options.num, batch, layout or options.format or "safetensors")
    sample_many(var, bulk, options.out, rank, processes)
    if rank == 0:
        if layout is not None:
            layout.finish(options.out)
        print(f"{options.num} images in {options.out}")
        if options.npz:
            write_npz(options.out, bulk, options.npz)
            print(f"wrote {options.npz}")
