"""Fit exponents to how time and memory of sampling grow: with batch, resolution, depth, experts and rates.

    python -m benchmarks.scaling --axes batch depth
    python -m benchmarks.scaling --project h100 --price 2.50

Random weights, float32, this machine. One block of a large model runs, after the true cache, and its time is multiplied
by the depth; head, sampling and decoder are then not in it. Memory is the bound of `benchmarks/memory.py`, of the whole
model. `--project` prints what a GPU would do by the *predicted* times of `benchmarks/virtual_gpu.py`; nothing in it is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

from actvar.config import DENSE, ActVARConfig
from actvar.flops import StepFlops, model_flops, total_flops
from actvar.models import build_vae_var
from actvar.patching.patch import patched_silently
from actvar.reports.flops import shapes_of
from actvar.sampling.request import Sampling
from actvar.sampling.timing import block_seconds
from actvar_kernels.constants import FORMATS
from actvar_kernels.operations.shapes import HEAD_DIM, SIZES
from actvar_kernels.tools.compile_check import LineParser
from benchmarks import results, sampling
from benchmarks.memory import MIB, bound, kernels_run
from benchmarks.roofline import CARDS

SIDES = {
    256: SIZES["d16"].sides,
    512: SIZES["d36"].sides,
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Token maps by pixels; those of 1024 are Infinity's, no published VAR has them."""


PAPER = ActVARConfig()


@dataclass(frozen=True)
class Point:
    """Name one model and configuration; `x` is where it is on its axis."""

    axis: str
    x: float
    model: str
    batch: int
    config: ActVARConfig = PAPER
    pixels: int | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        return SIZES[self.model].sides if self.pixels is None else SIDES[self.pixels]

    @property
    def depth(self) -> int:
        return SIZES[self.model].width // HEAD_DIM

    @property
    def whole(self) -> bool:
        """Return whether the whole model is sampled, not one block of it."""
        return self.model == "fashion-mnist"

    @property
    def shape(self) -> results.Shape:
        config = self.config
        return results.Shape(self.model, self.batch, "fp32", config.ffn_rates[0], self.sides[-1], config.num_experts)


def _rate(rate: float) -> ActVARConfig:
    return ActVARConfig(token_rates=(rate, rate), ffn_rate=rate)


AXES = {
    "batch": [Point("batch", batch, "fashion-mnist", batch) for batch in (1, 2, 4, 8, 16)],
    "resolution": [Point("resolution", side, "d16", 1, pixels=side) for side in SIDES],
    "depth": [
        Point("depth", p.width / 64, name, 1, pixels=256) for name, p in SIZES.items() if name != "fashion-mnist"
    ],
    "experts": [Point("experts", n, "d16", 1, ActVARConfig(num_experts=n)) for n in (4, 8, 16, 32)],
    "rate": [Point("rate", rate, "fashion-mnist", 16, _rate(rate)) for rate in (0.25, 0.5, 0.75, 1.0)],
}
WAYS = ("dense", "accelerated", "ActVAR")
PROJECTED = ("predicted_ms", "predicted_images_per_gpu_hour", "predicted_dollars_per_million")
WHOLE, BLOCKS, LAST_TWO = "whole sample", "all blocks", "blocks, last two"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.project is not None:
        if options.price is None:
            parser.error("--project needs --price, dollars for an hour of one GPU")
        report = projection(options.project, options.price, options.models, options.batches)
        print(projection_text(report))
    else:
        if options.csv is not None:
            sampling.expect_kernels(parser)
        rows, report = [], {}
        for axis in options.axes:
            report[axis] = scaled(AXES[axis], options.repeats, rows)
            print(text(axis, report[axis]), flush=True)
            if options.csv is not None:
                results.add(options.csv, rows)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = LineParser("python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="(default all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default 3)")
    parser.add_argument("--csv", type=Path, help="add the numbers to this file, see benchmarks/results.py")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--project", choices=CARDS, metavar="GPU", help=f"predict for one of {', '.join(CARDS)}")
    parser.add_argument("--price", type=float, help="of --project: dollars for an hour of one GPU")
    models = [name for name in SIZES if name != "fashion-mnist"]
    parser.add_argument("--models", nargs="+", choices=models, default=["d16", "d30"], help="of --project")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64], help="of --project: images at once on a GPU")
    return parser


def scaled(points: Sequence[Point], repeats: int, rows: list[results.Result]) -> dict[str, object]:
    """Return milliseconds (medians), MiB and GFLOP by way at every point, and their exponents; add them to `rows`."""
    table: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for point in points:
        for way, figures in measured(point, repeats).items():
            for (operation, metric), values in figures.items():
                row = point.shape.row(way, operation, metric, values)
                rows.append(replace(row, operation=f"scaling {point.axis}: {operation}"))
                table[way].setdefault(f"{operation}, {metric}", []).append(row.p50)
    x = [point.x for point in points]
    exponents = {
        way: {figure: exponent(x, values) for figure, values in figures.items()} for way, figures in table.items()
    }
    return {"x": x, "figures": table, "exponents": exponents, "one_block": not points[0].whole}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return b of the power law `y = a x^b` by least squares of the logarithms.

    Raises:
        ValueError: fewer than two different x, or a number that is not above 0.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"expected positive numbers at two or more different x, got x {list(x)} and y {list(y)}")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    covariance = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return covariance / sum((a - mean_u) ** 2 for a in u)


def measured(point: Point, repeats: int) -> dict[str, dict[tuple[str, str], list[float]]]:
    """Return by way the values of every (operation, metric) at one point."""
    var, adapter = _model(point)
    ways = {
        "dense": lambda: contextlib.nullcontext(var),
        "accelerated": lambda: patched_silently(var, replace(DENSE, num_experts=point.config.num_experts), None),
        "ActVAR": lambda: patched_silently(var, point.config, adapter),
    }
    measure = sampling.timed if point.whole else one_block
    drawn = sampling.sampling_of(var, point.batch)
    describe = f"{point.axis} {point.x:g}"
    times = sampling.interleaved(ways, lambda used: measure(used, drawn), repeats, describe)
    vae, shapes = _shapes(point)
    found = {}
    for way, runs in times.items():
        blocks, operations = (1, (WHOLE, BLOCKS, LAST_TWO)) if point.whole else (point.depth, (BLOCKS, LAST_TWO))
        found[way] = {(name, "ms"): [1e3 * blocks * run[name] for run in runs] for name in operations}
        config = point.config if way == "ActVAR" else DENSE
        kernels = way != "dense" and kernels_run(torch.float32)
        found[way]["memory bound", "MiB"] = [bound(vae, shapes, point.batch, config, kernels).total / MIB]
        steps = model_flops(shapes, point.batch, config)
        found[way]["transformer", "GFLOP"] = [total_flops(steps) / 1e9]
        found[way][BLOCKS, "GFLOP"] = [_block_flops(steps) / 1e9]
        found[way][LAST_TWO, "GFLOP"] = [_block_flops(steps[-2:]) / 1e9]
    return found


def _block_flops(steps: Sequence[StepFlops]) -> int:
    return sum(step.total - step.adaln - step.head for step in steps)


def _model(point: Point) -> tuple[nn.Module, Path | None]:
    """Return what runs: the bundled model, or one block of an official size with a small autoencoder."""
    if point.whole:
        var, adapter = sampling.model(point.model)
        return var, adapter if point.config == PAPER else None
    width = SIZES[point.model].width
    small = dict(ch=32, ch_mult=(1,), num_res_blocks=1, num_classes=10, shared_aln=point.model == "d36")
    return build_vae_var(depth=1, width=width, patch_nums=point.sides, **small)[1], None


def _shapes(point: Point) -> tuple[nn.Module, nn.Module]:
    """Return autoencoder and transformer of the point's full depth, on the meta device."""
    if point.pixels is None:
        return shapes_of(point.model)
    return build_vae_var(depth=point.depth, patch_nums=point.sides, shared_aln=point.model == "d36", device="meta")


@torch.no_grad()
def one_block(var: nn.Module, drawn: Sampling) -> dict[str, float]:
    """Return the seconds of the one block of `var` over all scales with its cache, and over the last two."""
    rows, block = 2 * len(drawn.labels), var.blocks[0]
    cond = torch.zeros(rows, var.C)
    modulation = var.shared_ada_lin(cond)
    generator = torch.Generator().manual_seed(0)
    block.attn.kv_caching(True)
    try:
        with block_seconds(var) as seconds:
            for side in var.patch_nums:
                block(torch.randn(rows, side * side, var.C, generator=generator), modulation, None)
    finally:
        block.attn.kv_caching(False)
    of_scales = [seconds[side * side] for side in var.patch_nums]
    return {BLOCKS: sum(of_scales), LAST_TWO: sum(of_scales[-2:])}


def text(axis: str, report: dict) -> str:
    """Return a table to read."""
    note = ", time of one block by the depth" if report["one_block"] else ""
    lines = [f"{axis}{note}".ljust(44) + "".join(f"{x:>12g}" for x in report["x"]) + f"{'exponent':>12s}"]
    for way, figures in report["figures"].items():
        for figure, values in figures.items():
            numbers = "".join(f"{value:12.4g}" for value in values)
            lines.append(f"{way + ': ' + figure:44s}{numbers}{report['exponents'][way][figure]:12.2f}")
    return "\n".join(lines) + "\n"


def projection(gpu: str, dollars_per_hour: float, models: Sequence[str], batches: Sequence[int]) -> list[dict]:
    """Return launches, *predicted* milliseconds, images per GPU-hour and dollars per million images.

    They are those of whole samples with decoder in bfloat16, by CUDA graphs, also with products in eight bits. GPUs
    share nothing while sampling, so a cluster makes as many times more.
    """
    from benchmarks import virtual_gpu

    card, rows = CARDS[gpu], []
    for model in models:
        for batch in batches:
            configs = {"dense": virtual_gpu.DENSE, "ActVAR": virtual_gpu.ACTVAR}
            for (way, config), weights in product(configs.items(), (None, *FORMATS)):
                run = virtual_gpu.sampling_run(model, batch, card.arch, config, weights=weights)
                times = virtual_gpu.summary(run, card, virtual_gpu.share_function("measured"))
                milliseconds = times["whole_run_ms"] + times["decoder_ms"]
                rows.append(
                    {"gpu": gpu, "model": model, "batch": batch, "way": f"{way} {weights or ''}".strip()}
                    | {"predicted_ms": milliseconds}
                    | {f"predicted_{part}_ms": times[f"{part}_ms"] for part in times["launches"]}
                    | {f"launches_{part}": launches for part, launches in times["launches"].items()}
                    | predicted_cost(milliseconds, batch, dollars_per_hour)
                )
    return rows


def predicted_cost(milliseconds: float, batch: int, dollars_per_hour: float) -> dict[str, float]:
    """Return images per GPU-hour, and dollars per million images, if a batch takes so long."""
    per_hour = batch * 3.6e6 / milliseconds
    return {
        "predicted_images_per_gpu_hour": per_hour,
        "predicted_dollars_per_million": dollars_per_hour / per_hour * 1e6,
    }


def projection_text(rows: Sequence[dict]) -> str:
    """Return a table to read."""
    lines = [f"{rows[0]['gpu']}, bfloat16: every figure is predicted, none is measured"]
    heads = ("predicted ms", "images/GPU-hour", "$/million")
    lines.append(f"{'model':8s}{'batch':>6s}  {'':12s}" + "".join(f"{head:>17s}" for head in heads))
    for row in rows:
        values = [row[name] for name in PROJECTED]
        lines.append(f"{row['model']:8s}{row['batch']:6d}  {row['way']:12s}" + "".join(f"{v:17,.1f}" for v in values))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
