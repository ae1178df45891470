"""Sample the same images dense and with ActVAR: pictures, time and FLOPs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from actvar.config import DENSE
from actvar.evaluate.similarity import psnr, ssim
from actvar.flops import StepFlops, counted_flops, model_flops, total_flops
from actvar.models.arguments import checked_integer
from actvar.models.vqvae import without_decoder
from actvar.patching.patch import patched_silently, unpatched
from actvar.reports.infinity.flops import counted_infinity_flops, infinity_flops
from actvar.reports.token_overlay import save_token_overlay
from actvar.sampling.request import Sampling
from actvar.sampling.samplers import drawn_by
from actvar.sampling.text_request import TextSampling
from actvar.sampling.timing import block_seconds, interleaved_medians, seconds_of
from actvar.sparse.contexts import record
from actvar.sparse.record import BlockRecord
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of, is_on_gpu
from actvar.utils.pictures import save_images
from actvar.utils.wrappers import unwrapped

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Comparison:
    """Times and FLOPs of the same sample drawn in several ways.

    Seconds are by the names `dense`, `actvar` and `accelerated`, the dense model on the kernels (`actvar.accelerate`).
    FLOPs are by `dense` and `actvar`. Nothing is called `actvar` where the dense model alone was drawn.

    Args:
        images: of the sample.
        seconds: of the whole sample.
        block_seconds: of the blocks at the active scales; empty where no scale is active.
        formula_flops: of the transformer, by formula.
        counted_flops: of the transformer, by torch's counter.
        psnr, ssim: of the images to the dense ones, by the names `accelerated` and `actvar`, see
            `actvar.evaluate.similarity`.
    """

    images: int
    seconds: dict[str, float]
    block_seconds: dict[str, float]
    formula_flops: dict[str, int]
    counted_flops: dict[str, int]
    psnr: dict[str, float]
    ssim: dict[str, float]

    def table(self) -> str:
        """Return the comparison as aligned text."""
        names = list(self.seconds)

        def row(label: str, values: Mapping[str, float], unit: float, digits: int, gain: Sequence[str] = ()) -> str:
            columns = (values.get(name, values["dense"]) / unit for name in names)
            return f"{label:<34}" + "".join(f"{value:>13.{digits}f}" for value in columns) + "".join(gain)

        def speedup(values: dict[str, float]) -> list[str]:
            return [f"{values[name] / values[names[-1]]:>12.2f}x" for name in names[:-1]]

        def saving(values: dict[str, int]) -> list[str]:
            return [f"{1 - values[name] / values['dense']:>12.1%} saved" for name in names if name == "actvar"]

        def to_dense(label: str, values: dict[str, float], digits: int) -> str:
            columns = (f"{values[name]:>13.{digits}f}" for name in names[1:])
            return f"{label:<34}{'':>13}" + "".join(columns)

        blocks = []
        if self.block_seconds:
            blocks = [row("blocks of the active scales, ms", self.block_seconds, 1e-3, 1, speedup(self.block_seconds))]
        rate = {name: self.images / seconds for name, seconds in self.seconds.items()}
        titles = [name.replace("actvar", "ActVAR") for name in names]
        titles += [f"vs {name.replace('accelerated', 'accel.')}" for name in names[:-1]]
        return "\n".join(
            [
                f"{'':<34}" + "".join(f"{title:>13}" for title in titles),
                row("whole sample, ms", self.seconds, 1e-3, 1, speedup(self.seconds)),
                row("images per second", rate, 1, 1),
                *blocks,
                row("transformer GFLOP, formula", self.formula_flops, 1e9, 2, saving(self.formula_flops)),
                row("transformer GFLOP, counted", self.counted_flops, 1e9, 2, saving(self.counted_flops)),
                to_dense("PSNR to the dense images, dB", self.psnr, 1),
                to_dense("SSIM to the dense images", self.ssim, 4),
            ]
        )

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON values, where an infinite PSNR, of equal images, is None."""
        facts: dict[str, object] = asdict(self)
        facts["psnr"] = {name: value if math.isfinite(value) else None for name, value in self.psnr.items()}
        return facts


@dataclass(frozen=True)
class FirstSamples:
    """Hold the same images as each way draws them first, which also warms it up.

    Args:
        images: `[B, C, H, W]` in [0, 1] by the names `dense`, `accelerated` and `actvar`.
        records: what the blocks of ActVAR chose; empty where the dense model alone is drawn.
    """

    images: dict[str, torch.Tensor]
    records: list[BlockRecord]


def first_samples(var: nn.Module, sampling: Sampling | TextSampling) -> FirstSamples:
    """Draw the same images dense, by the dense model on the kernels, and with ActVAR.

    ActVAR is left out where the patch has the configuration `DENSE`, by which it is the dense model on the kernels.

    Args:
        var: a patched model.
        sampling: the images.
    """
    ways = ways_of(var, lambda: sampling.run(var))
    with record(var) as records:
        return FirstSamples({name: way() for name, way in ways.items()}, records)


def compare(var: nn.Module, sampling: Sampling | TextSampling, first: FirstSamples, repeats: int) -> Comparison:
    """Measure the dense model, the same on the kernels, and with ActVAR, in turn.

    On a GPU each way is warmed up once more: what is recorded, or timed by blocks, runs without a CUDA graph.

    Args:
        var: a model whose patch is the same as for `first`, so that its packed weights stay.
        sampling: the images to draw.
        first: these images, as each way drew them.
        repeats: of every measurement, whose median is taken.

    Raises:
        TypeError: repeats that are no integer.
        ValueError: repeats below 1.
    """
    repeats = checked_integer("repeats", repeats, 1)
    device, warm_ups = device_of(var), int(is_on_gpu(var))
    active_tokens = {scale.tokens for schedule in patch_state(var).schedules for scale in schedule if scale.active}

    def blocks() -> float:
        with block_seconds(var) as seconds, without_decoder(unwrapped(var), "decode"):
            sampling.run(var)
        return sum(seconds[tokens] for tokens in active_tokens)

    ways = ways_of(var, lambda: seconds_of(lambda: sampling.run(var), device))
    seconds = interleaved_medians(ways, repeats, "whole samples", warm_ups)
    block_times = {}
    if active_tokens:
        block_times = interleaved_medians(all_ways(var, blocks), repeats, "blocks", warm_ups)
    flops = {}
    with unpatched(var):
        flops["dense"] = transformer_flops(var, sampling)
    if "actvar" in ways:
        flops["actvar"] = transformer_flops(var, sampling)
    formula, counted = ({name: both[i] for name, both in flops.items()} for i in range(2))
    dense, others = first.images["dense"], [name for name in ways if name != "dense"]
    near, alike = ({name: measure(first.images[name], dense) for name in others} for measure in (psnr, ssim))
    return Comparison(len(sampling.labels), seconds, block_times, formula, counted, near, alike)


def transformer_flops(var: nn.Module, sampling: Sampling | TextSampling) -> tuple[int, int]:
    """Return the FLOPs of a model's transformer for the images of a request, by formula and by torch's counter.

    Args:
        var: a model, patched or not.
        sampling: the images.
    """
    images = len(sampling.labels)
    if isinstance(sampling, TextSampling):
        counted = counted_infinity_flops(var, sampling.schedule, images, sampling.text_tokens)
    else:
        counted = counted_flops(var, images)
    return total_flops(flops_by_scale(var, sampling)), total_flops(counted)


def flops_by_scale(var: nn.Module, sampling: Sampling | TextSampling) -> list[StepFlops]:
    """Return the FLOPs of a model's transformer at each scale by formula, for the images of a request."""
    images = len(sampling.labels)
    if isinstance(sampling, TextSampling):
        return infinity_flops(var, sampling.schedule, images, sampling.text_tokens)
    return model_flops(var, images)


def all_ways(var: nn.Module, measure: Callable[[], Measured]) -> dict[str, Callable[[], Measured]]:
    """Return `measure` by the name of the way in which it finds the model.

    `actvar` is the patched `var`, `dense` the model without its patch, and `accelerated` the dense model on the kernels
    by the same Execution. All draw tokens by the sampler of that Execution.

    Args:
        var: a patched model.
        measure: called without arguments.
    """

    def dense() -> Measured:
        sampler = patch_state(var).execution.sampler
        with unpatched(var), drawn_by(var, sampler):
            return measure()

    def accelerated() -> Measured:
        with patched_silently(var, DENSE, None, patch_state(var).execution):
            return measure()

    return {"dense": dense, "accelerated": accelerated, "actvar": measure}


def ways_of(var: nn.Module, measure: Callable[[], Measured]) -> dict[str, Callable[[], Measured]]:
    """Return `all_ways`, without `actvar` where the patch has the configuration `DENSE`; arguments are the same."""
    ways = all_ways(var, measure)
    if patch_state(var).config == DENSE:
        del ways["actvar"]
    return ways


def save_comparison(
    first: FirstSamples, folder: Path, columns: int, titles: Sequence[str], single: bool = False
) -> list[Path]:
    """Write `dense.png`, `actvar.png`, `difference.png` and, where tokens are selected, `tokens.png`.

    `accelerated.png` takes the place of `actvar.png` where the dense model alone was drawn.

    Args:
        first: the images.
        folder: of the pictures.
        columns: images per row of the grids.
        titles: a label per image, for the token overlay, which shows the first image of up to five rows.
        single: whether each image is a PNG of its own, such as `dense-00000.png`, in place of a grid.

    Returns:
        The files.
    """
    dense, (name, other) = first.images["dense"], list(first.images.items())[-1]
    written = []
    for shown, images in {"dense": dense, name: other, "difference": (dense - other).abs()}.items():
        written += save_images(images, folder, shown, columns, single)
    if any(block_record.index is not None for block_record in first.records):
        rows = list(range(0, len(other), columns))[:5]
        records, names = [r.only(rows) for r in first.records], [titles[i] for i in rows]
        written.append(save_token_overlay(other[rows], records, folder / "tokens.png", names))
    return written
