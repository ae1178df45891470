"""The course of one sample: the image after each scale, the choices of the blocks, time and FLOPs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from actvar.config import ActVARConfig
from actvar.families import blocks_of, family_of
from actvar.flops import StepFlops
from actvar.models import VAR, Infinity
from actvar.models.arguments import checked_integer
from actvar.patching.patch import patched_silently
from actvar.reports.compare import all_ways, flops_by_scale
from actvar.sampling.request import Sampling
from actvar.sampling.text_request import TextSampling
from actvar.sampling.timing import interleaved_seconds, step_seconds
from actvar.sparse.contexts import record
from actvar.sparse.record import BlockRecord
from actvar.utils.progress import progress


@dataclass(frozen=True)
class Inspection:
    """One image, drawn dense and with ActVAR from the same seed.

    Images, FLOPs and seconds are by the names `dense` and `actvar`. Seconds also have `accelerated`, the dense model on
    the kernels.

    Args:
        sampling: the request.
        config: of ActVAR.
        maps: height and width of the token map of every scale.
        blocks: number of blocks.
        images: decoded after each of the S scales, `[S, C, H, W]` float32 in [0, 1].
        records: choices of the blocks for the image's conditional row.
        flops: by scale.
        seconds: medians by scale, with the decoder's last.
    """

    sampling: Sampling | TextSampling
    config: ActVARConfig
    maps: tuple[tuple[int, int], ...]
    blocks: int
    images: dict[str, torch.Tensor]
    records: list[BlockRecord]
    flops: dict[str, list[StepFlops]]
    seconds: dict[str, list[float]]


def inspect_sample(
    var: VAR | Infinity,
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: Sampling | TextSampling,
    repeats: int,
) -> Inspection:
    """Draw one image, and measure every step.

    Args:
        var: an unpatched model.
        config: of ActVAR.
        adapter: file of the gates; None for gates without training.
        sampling: the request, for one image.
        repeats: of the timing, whose medians are taken.

    Raises:
        TypeError: repeats that are no integer.
        ValueError: a configuration or adapter that does not fit the model, more than one image, or repeats below 1.
    """
    repeats = checked_integer("repeats", repeats, 1)
    if len(sampling.labels) != 1:
        raise ValueError(f"sampling: expected one image to look at, got {len(sampling.labels)} labels")
    images = {"dense": _images_by_scale(var, sampling)}
    flops = {"dense": flops_by_scale(var, sampling)}
    with patched_silently(var, config, adapter):
        with record(var) as records:
            images["actvar"] = _images_by_scale(var, sampling)
        flops["actvar"] = flops_by_scale(var, sampling)
        ways = all_ways(var, lambda: step_seconds(var, lambda: sampling.run(var)))
        runs = interleaved_seconds(ways, repeats, "timing steps")
    seconds = {name: [statistics.median(step) for step in zip(*steps, strict=True)] for name, steps in runs.items()}
    image_records = [block_record.only([0]) for block_record in records]
    maps = sampling.maps(var)
    return Inspection(sampling, config, maps, len(blocks_of(var)), images, image_records, flops, seconds)


@torch.no_grad()
def _images_by_scale(var: VAR | Infinity, sampling: Sampling | TextSampling) -> torch.Tensor:
    features: list[torch.Tensor] = []
    with family_of(var).watch_scales(var, lambda _scale, _tokens, image: features.append(image.clone())):
        sampling.run(var)
    steps = progress(features, desc="decoding steps", leave=False)
    return torch.cat([var.decode(f_hat).add(1).mul(0.5).float().cpu() for f_hat in steps])
