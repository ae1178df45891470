"""Wall-clock time of sampling on this machine: the public code, our dense model, the same accelerated, and ActVAR.

    python -m benchmarks.sampling --model d16 --batch 1 --dtype bf16 --public-var DIR

Official sizes have random weights, which change no time; `fashion-mnist` is the bundled model with its adapter. All
ways are timed in turn in one process, and the table is of medians. In float32 every dense way must draw the same images
first. In bfloat16 our weights are in it, while the public code's are in float32 under autocast, decoder included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from actvar import ActVARConfig, load_pretrained
from actvar.compare import Sampling
from actvar.models import build_vae_var
from actvar.patch import DENSE, patched_silently
from actvar.public_code import public_classes, public_twin
from actvar.timing import block_seconds
from actvar.zoo.pretrained import adapter_path
from actvar_kernels.compile_cases import HEAD_DIM, MODELS
from actvar_kernels.compile_check import LineParser
from actvar_kernels.expert_ffn import cpu_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIGURES = ("whole sample", "autoregressive part", "all blocks", "blocks, last two", "decoder")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    dtype = DTYPES[options.dtype]
    var, adapter = model(options.model)
    ways = {}
    if options.public_var is not None:
        public = public_twin(var, public_classes(options.public_var))
        public.vae_proxy[0].fhat_to_img = partial(public_decode, var.vae_proxy[0])
        ways["public code"] = lambda: autocast(public, dtype)
    var.to(dtype)
    ways["dense"] = lambda: contextlib.nullcontext(var)
    ways["accelerated"] = lambda: patched_silently(var, DENSE, None)
    ways["ActVAR"] = lambda: patched_silently(var, ActVARConfig(), adapter)
    labels = tuple(number % var.num_classes for number in range(options.batch))
    sampling = Sampling(labels, cfg=4.0, top_k=min(900, var.V), top_p=0.95)

    if dtype == torch.float32:
        expect_equal_images({name: way for name, way in ways.items() if name != "ActVAR"}, sampling)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in tqdm(range(options.repeats + 1), desc="sampling", leave=False):
        for name, way in ways.items():
            with way() as used:
                figures = timed(used, sampling)
            if repeat:  # the first one warms up
                runs[name].append(figures)
    report = {
        "machine": machine(),
        **{name: getattr(options, name) for name in ("model", "batch", "dtype", "repeats")},
        "seconds": {
            name: {key: statistics.median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()
        },
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(text(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = LineParser("python -m benchmarks.sampling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=("fashion-mnist", *MODELS), default="fashion-mnist")
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each way (default 5)")
    parser.add_argument("--public-var", type=Path, help="clone of the public VAR code, to be timed as well")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser


def model(name: str) -> tuple[nn.Module, Path | None]:
    """A dense VAR in float32 on the CPU, and the adapter that ships with it."""
    if name == "fashion-mnist":
        return load_pretrained(name)[1], adapter_path(name, "paper")
    width, sides = MODELS[name]
    _, var = build_vae_var(depth=width // HEAD_DIM, width=width, patch_nums=sides, shared_aln=name == "d36")
    with torch.no_grad():  # gates start at almost 0, where a wrong block would go unnoticed
        for block in var.blocks:
            gammas = block.ada_gss[:, :, :2] if block.shared_aln else block.ada_lin[-1].weight[: 2 * var.C]
            gammas.mul_(0.5e5)
    return var, None


def public_decode(vae: nn.Module, f_hat: torch.Tensor) -> torch.Tensor:
    """`fhat_to_img` as the public code has it."""
    return vae.decoder(vae.post_quant_conv(f_hat)).clamp_(-1, 1)


@contextmanager
def autocast(var: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The public code keeps its weights in float32 and samples under autocast."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        yield var


def expect_equal_images(ways: dict[str, Callable], sampling: Sampling) -> None:
    """
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
    """Seconds of one sample and of its parts, and of the blocks at every scale."""
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
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "experts": cpu_kernel.why_unavailable() or cpu_kernel.level_name(cpu_kernel.best_level()),
    }


def text(report: dict) -> str:
    """The report to read: milliseconds, and ActVAR's speed-up over every other way."""
    seconds = report["seconds"]
    others = [name for name in seconds if name != "ActVAR"]
    title = "{model}, batch {batch}, {dtype}, medians of {repeats}".format(**report)
    head = f"{'milliseconds':24s}" + "".join(f"{name:>13s}" for name in seconds)
    lines = [f"{title}, {report['machine']['threads']} threads", head + "".join(f"{'vs ' + n:>16s}" for n in others)]
    for figure in seconds["ActVAR"]:
        row = f"{figure:24s}" + "".join(f"{1e3 * seconds[name][figure]:13.1f}" for name in seconds)
        gains = (seconds[name][figure] / seconds["ActVAR"][figure] for name in others)
        lines.append(row + "".join(f"{gain:15.2f}x" for gain in gains))
    lines.append(f"peak memory of the process, all ways together: {report['peak_memory_mib']:.0f} MiB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
