"""Time sampling on this machine: the public code, our dense model, the same accelerated, and ActVAR.

    python -m benchmarks.sampling --model d16 --batch 1 --dtype bf16 --public-var DIR

Official sizes have random weights, which change no time; `fashion-mnist` is the bundled model with its adapter. All
ways are timed in turn in one process, and the table is of medians. In float32 every dense way must draw the same images
first. In bfloat16 our weights are in it, while the public code's are in float32 under autocast, decoder included. The
last two ways are ActVAR with an option that changes numbers; `--weights int8` adds two in eight bits. The operations
that each way ran fused, in C++ or Triton, are listed below the times.
`--components` splits every step into its components, `--memory` measures each way in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from actvar import ActVARConfig, Execution, load_pretrained
from actvar.config import DENSE
from actvar.models import build_vae_var
from actvar.models.public_code import public_classes, public_twin
from actvar.patching.patch import patched_silently
from actvar.sampling.request import Sampling
from actvar.sampling.timing import block_seconds
from actvar.zoo.pretrained import adapter_path
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import choices, cpu
from actvar_kernels.operations.shapes import HEAD_DIM, MODELS
from actvar_kernels.tools.compile_check import LineParser
from benchmarks import components, fused, memory, results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("public code", "dense", "accelerated", "ActVAR", "fast sampler", "bf16 decoder")
INT8_WAYS = ("accelerated int8", "ActVAR int8")
WIDTH = 18
"""Columns of a way in the printed table."""
FIGURES = ("whole sample", "autoregressive part", "all blocks", "blocks, last two", "decoder")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.csv is not None:
        expect_kernels(parser)
    dtype = DTYPES[options.dtype]
    var, adapter = model(options.model)
    compared = ways(var, adapter, dtype, options.public_var, options.weights)
    sampling = sampling_of(var, options.batch)
    if dtype == torch.float32:
        expect_equal_images({name: way for name, way in compared.items() if name in WAYS[:3]}, sampling)

    runs = interleaved(compared, lambda used: timed(used, sampling), options.repeats, "sampling")
    report = {
        "machine": machine(),
        **{name: getattr(options, name) for name in ("model", "batch", "dtype", "repeats")},
        "seconds": {name: medians(rows) for name, rows in runs.items()},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    shape = results.Shape(options.model, options.batch, options.dtype, 0.75, var.patch_nums[-1])
    rows = [
        shape.row(name, figure, "ms", [1e3 * run[figure] for run in of_way])
        for name, of_way in runs.items()
        for figure in of_way[0]
    ]
    print(text(report))
    report["fused"] = _fused(compared, sampling)
    print(fused.text(report["fused"]))
    if options.components or options.plot is not None:
        report["components"] = _components(compared, sampling, options.repeats, shape, rows)
        print(components.table(report["components"]))
    if options.memory:
        report["memory_mib"] = _memory(compared, options, shape, rows)
        print(memory.table(report["memory_mib"]))
    if options.plot is not None:
        title = f"{options.model}, batch {options.batch}, {options.dtype}: time per step by component"
        components.save_plot(report["components"], title, options.plot)
    if options.csv is not None:
        results.add(options.csv, rows)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = shape_parser("python -m benchmarks.sampling", __doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each way (default 5)")
    parser.add_argument("--components", action="store_true", help="also time every component of every step")
    parser.add_argument("--memory", action="store_true", help="also measure memory, each way in a process of its own")
    parser.add_argument("--plot", type=Path, help="write the components as a PNG")
    parser.add_argument("--csv", type=Path, help="add the numbers to this file, see benchmarks/results.py")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser


def shape_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that say what is sampled."""
    parser = LineParser(program, description=description)
    parser.add_argument("--model", choices=("fashion-mnist", *MODELS), default="fashion-mnist")
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--public-var", type=Path, help="clone of the public VAR code, to be measured as well")
    parser.add_argument("--weights", choices=("int8",), help="also measure products in eight bits")
    return parser


def expect_kernels(parser: argparse.ArgumentParser) -> None:
    """End the program where "accelerated" and "ActVAR" would run the reference on the CPU."""
    if cpu.why_unavailable() is not None:
        parser.error(f"--csv: rows are of the C++ kernels, which do not run here: {cpu.why_unavailable()}")


def ways(
    var: nn.Module, adapter: Path | None, dtype: torch.dtype, public_folder: Path | None, weights: str | None = None
) -> dict[str, Callable]:
    """Return by name a context manager that gives the model to sample with; `var` is in float32 and gets `dtype`."""
    found = {}
    if public_folder is not None:
        public = public_twin(var, public_classes(public_folder))
        public.vae_proxy[0].fhat_to_img = partial(public_decode, var.vae_proxy[0])
        found["public code"] = lambda: autocast(public, dtype)
    var.to(dtype)
    found["dense"] = lambda: contextlib.nullcontext(var)
    found["accelerated"] = lambda: patched_silently(var, DENSE, None)
    found["ActVAR"] = lambda: patched_silently(var, ActVARConfig(), adapter)
    found["fast sampler"] = lambda: patched_silently(var, ActVARConfig(), adapter, Execution(sampler="fast"))
    half = Execution(decoder_dtype="bfloat16")
    found["bf16 decoder"] = lambda: patched_silently(var, ActVARConfig(), adapter, half)
    if weights is not None:
        in_bytes = Execution(weights=weights)
        dense, sparse = INT8_WAYS
        found[dense] = lambda: patched_silently(var, DENSE, None, in_bytes)
        found[sparse] = lambda: patched_silently(var, ActVARConfig(), adapter, in_bytes)
    return found


def sampling_of(var: nn.Module, batch: int) -> Sampling:
    """Return the request for the images that every way draws."""
    return Sampling(
        tuple(number % var.num_classes for number in range(batch)), cfg=4.0, top_k=min(900, var.V), top_p=0.95
    )


def interleaved(compared: dict[str, Callable], measure: Callable, repeats: int, describe: str) -> dict[str, list]:
    """Return by way what `measure` returns for its model: all ways in turn, once to warm up and `repeats` times."""
    runs: dict[str, list] = {name: [] for name in compared}
    for repeat in tqdm(range(repeats + 1), desc=describe, leave=False):
        for name, way in compared.items():
            with way() as used:
                measured = measure(used)
            if repeat:
                runs[name].append(measured)
    return runs


def _fused(compared: dict[str, Callable], sampling: Sampling) -> dict[str, dict[str, int]]:
    """Return how often one sample calls each fused operation, by way."""
    found = {}
    for name, way in compared.items():
        with way() as used:
            found[name] = fused.fused_operations(partial(sampling.run, used))
    return found


def _components(
    compared: dict[str, Callable], sampling: Sampling, repeats: int, shape: results.Shape, rows: list[results.Result]
) -> dict[str, components.Steps]:
    """Return the medians of the seconds by way, step and component; also add them to `rows`."""

    def measure(var: nn.Module) -> components.Steps:
        return components.components(var, lambda: sampling.run(var))

    found: dict[str, components.Steps] = {}
    for name, runs in interleaved(compared, measure, repeats, "components").items():
        found[name] = [medians(list(of_step)) for of_step in zip(*runs, strict=True)]
        for number, of_step in enumerate(zip(*runs, strict=True), 1):
            for component in of_step[0]:
                values = [1e3 * step[component] for step in of_step]
                rows.append(shape.row(name, component, "ms", values, step=number))
    return found


def _memory(
    compared: dict[str, Callable], options: argparse.Namespace, shape: results.Shape, rows: list[results.Result]
) -> dict[str, dict[str, float]]:
    """Return MiB by way, as `memory.measured` gives them; also add them to `rows`."""
    found = {}
    for name in tqdm(compared, desc="memory", leave=False):
        found[name] = memory.measured(options.model, options.batch, options.dtype, name, options.public_var)
        for figure in ("peak", "bound"):
            rows.append(shape.row(name, f"memory {figure}", "MiB", [found[name][figure]]))
    return found


def model(name: str, device: str = "cpu") -> tuple[nn.Module, Path | None]:
    """Return a dense VAR in float32, and the adapter that ships with it."""
    if name == "fashion-mnist":
        # the dense model's weights, so that all ways share one packed copy
        return load_pretrained(name, device=device)[1], adapter_path(name, "paper-stage1")
    width, sides = MODELS[name]
    sizes = dict(depth=width // HEAD_DIM, width=width, patch_nums=sides, shared_aln=name == "d36")
    _, var = build_vae_var(**sizes, device=device)
    with torch.no_grad():  # gates start at almost 0, where a wrong block would go unnoticed
        for block in var.blocks:
            gammas = block.ada_gss[:, :, :2] if block.shared_aln else block.ada_lin[-1].weight[: 2 * var.C]
            gammas.mul_(0.5e5)
    return var, None


def public_decode(vae: nn.Module, f_hat: torch.Tensor) -> torch.Tensor:
    """Run `fhat_to_img` as the public code has it, with PyTorch's convolutions."""
    with using_backend("reference"):
        return vae.decoder(vae.post_quant_conv(f_hat)).clamp_(-1, 1)


@contextmanager
def autocast(var: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Sample as the public code does, which keeps its weights in float32 and samples under autocast."""
    with torch.autocast(var.head.weight.device.type, dtype, enabled=dtype != torch.float32):
        yield var


def expect_equal_images(ways: dict[str, Callable], sampling: Sampling) -> None:
    """Check that all ways draw the same images.

    Raises:
        RuntimeError: two of the ways draw images that differ by more than 1e-4.
    """
    expected = None
    for name, way in ways.items():
        with way() as var:
            images = sampling.run(var)
        expected = images if expected is None else expected
        difference = (images - expected).abs().max().item()
        if difference > 1e-4:
            raise RuntimeError(f"{name}: images differ from those of {next(iter(ways))} by {difference:.2g}; not timed")


def timed(var: nn.Module, sampling: Sampling) -> dict[str, float]:
    """Return the seconds of one sample and of its parts, and of the blocks at every scale."""
    vae = var.vae_proxy[0]
    decode, decoder = vae.fhat_to_img, []

    def timed_decode(f_hat: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        images = decode(f_hat)
        decoder.append(time.perf_counter() - start)
        return images

    vae.fhat_to_img = timed_decode
    try:
        with block_seconds(var) as blocks:
            start = time.perf_counter()
            sampling.run(var)
            whole = time.perf_counter() - start
    finally:
        vae.fhat_to_img = decode
    of_scales = [blocks[side * side] for side in var.patch_nums]
    parts = (whole, whole - decoder[0], sum(of_scales), sum(of_scales[-2:]), decoder[0])
    scales = {f"blocks, {side}x{side}": seconds for side, seconds in zip(var.patch_nums, of_scales, strict=True)}
    return dict(zip(FIGURES, parts, strict=True)) | scales


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {figure: statistics.median(row[figure] for row in rows) for figure in rows[0]}


def machine() -> dict[str, object]:
    return {
        "processor": results.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": cpu.why_unavailable() or choices.instructions(),
    }


def text(report: dict) -> str:
    """Return the report to read: milliseconds, and speed-ups over the first way and over the accelerated model."""
    seconds = report["seconds"]
    title = "{model}, batch {batch}, {dtype}, medians of {repeats}".format(**report)
    lines = [f"{title}, {report['machine']['threads']} threads", _head("milliseconds", seconds)]
    for figure in seconds["ActVAR"]:
        lines.append(f"{figure:24s}" + "".join(f"{1e3 * of_way[figure]:{WIDTH}.1f}" for of_way in seconds.values()))
    for base in (next(iter(seconds)), "accelerated"):
        lines += ["", _head(f"times {base}", seconds)]
        for figure in FIGURES:
            gains = (seconds[base][figure] / of_way[figure] for of_way in seconds.values())
            lines.append(f"{figure:24s}" + "".join(f"{gain:{WIDTH - 1}.2f}x" for gain in gains))
    lines.append(f"peak memory of the process, all ways together: {report['peak_memory_mib']:.0f} MiB\n")
    return "\n".join(lines)


def _head(title: str, ways: Iterable[str]) -> str:
    return f"{title:24s}" + "".join(f"{way:>{WIDTH}s}" for way in ways)


if __name__ == "__main__":
    sys.exit(main())
