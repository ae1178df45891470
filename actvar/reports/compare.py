"""Sample the same images dense and with ActVAR: pictures, time and FLOPs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from actvar.config import DENSE, ActVARConfig
from actvar.evaluate.similarity import psnr, ssim
from actvar.execution import Execution
from actvar.families import family_of
from actvar.flops import StepFlops, counted_flops, model_flops, total_flops
from actvar.models.arguments import checked_integer
from actvar.patching.patch import patched_silently, unpatched
from actvar.reports.infinity.flops import counted_infinity_flops, infinity_flops
from actvar.reports.token_overlay import save_token_overlay
from actvar.sampling.request import Sampling
from actvar.sampling.samplers import drawn_by
from actvar.sampling.text_request import TextSampling
from actvar.sampling.timing import block_seconds, interleaved_medians, seconds_of
from actvar.sparse.contexts import record
from actvar.sparse.schedule import build_schedule
from actvar.sparse.state import patch_state
from actvar.utils.devices import device_of
from actvar.utils.pictures import save_images

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


def compare(
    var: nn.Module,
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: Sampling | TextSampling,
    repeats: int,
    execution: Execution | None = None,
) -> Comparison:
    """Measure the dense model, the same on the kernels, and with ActVAR, in turn.

    ActVAR is left out where `config` is `DENSE`, by which it is the dense model on the kernels.

    Args:
        var: an unpatched model.
        config: of ActVAR.
        adapter: file of the gates; None for gates without training.
        sampling: the images to draw.
        repeats: of every measurement, whose median is taken.
        execution: of ActVAR and of the dense model on the kernels; None for what the adapter recommends.

    Raises:
        TypeError: repeats that are no integer.
        ValueError: a configuration or adapter that does not fit the model, repeats below 1.
    """
    repeats = checked_integer("repeats", repeats, 1)
    device = device_of(var)
    maps, blocks_of_model = sampling.maps(var), family_of(var).blocks(var)
    schedules = [build_schedule(config, maps, block) for block in range(len(blocks_of_model))]
    active_tokens = {scale.tokens for schedule in schedules for scale in schedule if scale.active}

    def blocks() -> float:
        with block_seconds(var) as seconds:
            sampling.run(var)
        return sum(seconds[tokens] for tokens in active_tokens)

    drawn: dict[str, torch.Tensor] = {}

    def whole(name: str, draw: Callable[[], float]) -> Callable[[], float]:
        def timed_and_kept() -> float:
            seconds = draw()
            drawn[name] = drawn.pop("last")
            return seconds

        return timed_and_kept

    def draw() -> float:
        return seconds_of(lambda: drawn.update(last=sampling.run(var)), device)

    formula, counted = {}, {}
    formula["dense"], counted["dense"] = transformer_flops(var, sampling)
    with patched_silently(var, config, adapter, execution):  # patched once, so that packed weights of the adapter stay
        ways = {name: whole(name, way) for name, way in all_ways(var, draw).items()}
        if config == DENSE:
            del ways["actvar"]
        seconds = interleaved_medians(ways, repeats, "whole samples")
        block_times = interleaved_medians(all_ways(var, blocks), repeats, "blocks") if active_tokens else {}
        if config != DENSE:
            formula["actvar"], counted["actvar"] = transformer_flops(var, sampling)
    others = [name for name in ways if name != "dense"]
    near, alike = ({name: measure(drawn[name], drawn["dense"]) for name in others} for measure in (psnr, ssim))
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


def save_comparison(
    var: nn.Module,
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: Sampling | TextSampling,
    folder: Path,
    columns: int,
    titles: Sequence[str],
    execution: Execution | None = None,
    single: bool = False,
) -> list[Path]:
    """Write `dense.png`, `actvar.png`, `difference.png` and, where tokens are selected, `tokens.png`.

    `accelerated.png` takes the place of `actvar.png` where `config` is `DENSE`.

    Args:
        var: an unpatched model.
        config: of ActVAR.
        adapter: file of the gates; None for gates without training.
        sampling: the images to draw.
        folder: of the pictures.
        columns: images per row of the grids.
        titles: a label per image, for the token overlay, which shows the first image of up to five rows.
        execution: of ActVAR; None for what the adapter recommends.
        single: whether each image is a PNG of its own, such as `dense-00000.png`, in place of a grid.

    Returns:
        The files.
    """
    with patched_silently(var, config, adapter, execution), record(var) as records:
        sparse = sampling.run(var)
        state = patch_state(var)
        selects = any(scale.select for scale in state.schedule)
    with drawn_by(var, state.execution.sampler):
        dense = sampling.run(var)
    name = "accelerated" if config == DENSE else "actvar"
    shown = {"dense": dense, name: sparse, "difference": (dense - sparse).abs()}
    written = []
    for name, images in shown.items():
        written += save_images(images, folder, name, columns, single)
    if selects:
        first = list(range(0, len(sparse), columns))[:5]
        first_records, names = [r.only(first) for r in records], [titles[i] for i in first]
        written.append(save_token_overlay(sparse[first], first_records, folder / "tokens.png", names))
    return written
