"""What happens while one image is drawn: the image after each scale, the choices of the blocks, time and FLOPs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from actvar.config import ActVARConfig
from actvar.families import blocks_of, family_of
from actvar.flops import StepFlops, model_flops
from actvar.models.arguments import checked_integer
from actvar.patching.patch import patched_silently
from actvar.reports.compare import all_ways
from actvar.sampling.request import Sampling
from actvar.sampling.timing import interleaved_seconds, step_seconds
from actvar.sparse.state import BlockRecord, record


@dataclass(frozen=True)
class Inspection:
    """One image, drawn dense and with ActVAR from the same seed.

    `images` `[S, C, H, W]` in [0, 1]: decoded after each of the S scales; `records`: what the blocks chose for the
    image's conditional row; `flops` by scale; `seconds` by scale, the decoder's last, medians. By name: `dense`,
    `actvar`, and seconds also of `accelerated`, the dense model on the kernels.
    """

    sampling: Sampling
    config: ActVARConfig
    sides: tuple[int, ...]
    blocks: int
    images: dict[str, torch.Tensor]
    records: list[BlockRecord]
    flops: dict[str, list[StepFlops]]
    seconds: dict[str, list[float]]


def inspect_sample(
    var: nn.Module, config: ActVARConfig, adapter: str | Path | None, sampling: Sampling, repeats: int
) -> Inspection:
    """Draw the one image of `sampling` with an `actvar.models.VAR`, and time it `repeats` times.

    Raises:
        TypeError: repeats that are no integer.
        ValueError: a configuration or adapter that does not fit the model, more than one image, or repeats below 1.
    """
    repeats = checked_integer("repeats", repeats, 1)
    if len(sampling.labels) != 1:
        raise ValueError(f"sampling: expected one image to look at, got {len(sampling.labels)} labels")
    images = {"dense": _images_by_scale(var, sampling)}
    flops = {"dense": model_flops(var, 1)}
    with patched_silently(var, config, adapter):
        with record(var) as records:
            images["actvar"] = _images_by_scale(var, sampling)
        flops["actvar"] = model_flops(var, 1)
        ways = all_ways(var, lambda: step_seconds(var, lambda: sampling.run(var)))
        runs = interleaved_seconds(ways, repeats, "timing steps")
    seconds = {name: [statistics.median(step) for step in zip(*of_way, strict=True)] for name, of_way in runs.items()}
    of_image = [of_block.only([0]) for of_block in records]
    sides = tuple(height for height, _ in family_of(var).maps(var))
    return Inspection(sampling, config, sides, len(blocks_of(var)), images, of_image, flops, seconds)


@torch.no_grad()
def _images_by_scale(var: nn.Module, sampling: Sampling) -> torch.Tensor:
    features: list[torch.Tensor] = []
    with family_of(var).watch_scales(var, lambda _scale, _tokens, image: features.append(image.clone())):
        sampling.run(var)
    steps = tqdm(features, desc="decoding steps", leave=False)
    return torch.cat([var.decode(of_scale).add(1).mul(0.5).float().cpu() for of_scale in steps])
