"""Draw the same images dense, accelerated and by a stop of a slider, with times and what was left out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from actvar.config import DENSE
from actvar.evaluate.similarity import psnr, ssim
from actvar.flops import model_flops, total_flops
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import patched_silently, unpatched
from actvar.reports.demo.subjects import Classes, Texts
from actvar.reports.token_overlay import tinted_by_updates
from actvar.sampling.request import Sampling
from actvar.sampling.summary import summary
from actvar.sampling.text_request import TextSampling
from actvar.sampling.timing import seconds_of
from actvar.sparse.contexts import record
from actvar.sparse.record import BlockRecord
from actvar.sparse.state import is_patched, patch_state
from actvar.utils.devices import device_of
from actvar.utils.pictures import as_grid

COLUMNS, SIDE = 5, 64
"""The most images in a row of the pictures, and the least pixels along each side of them; fewer ones are larger."""


@dataclass(frozen=True)
class Drawn:
    """Hold the images of one way of sampling.

    Args:
        title: name of the way.
        picture: all images in a grid.
        seconds: of the sample, the second one of two.
        lines: what was left out, and how near the images are to the dense ones.
        tinted: the grid with the updated tokens tinted, or None where all were updated.
    """

    title: str
    picture: Image.Image
    seconds: float
    lines: tuple[str, ...]
    tinted: Image.Image | None = None


class Drawing:
    """Draw the images of a model in several ways.

    Args:
        model: a VAR or an Infinity, not patched.
        subject: what the model draws.
        adapters: files of the slider's stops by name; None is the dense model on the kernels.

    Attributes:
        stops: the names in `adapters`, sorted by the FLOPs that they save, the most at the end.
    """

    def __init__(self, model: nn.Module, subject: Classes | Texts, adapters: Mapping[str, Path | None]):
        self.model, self.subject, self._adapters = model, subject, dict(adapters)
        self._maps = subject.first.maps(model)
        self._configs = {
            name: DENSE if file is None else read_adapter_config(file) for name, file in self._adapters.items()
        }
        cost = {name: total_flops(model_flops(model, 1, config, self._maps)) for name, config in self._configs.items()}
        self.stops = tuple(sorted(self._adapters, key=lambda name: -cost[name]))

    def describe(self, stop: str) -> str:
        """Return what a stop of the slider leaves out, as `actvar.summary` says it."""
        with patched_silently(self.model, self._configs[stop], self._adapters[stop]):
            patch_state(self.model).fit_maps(self.model, self._maps)
            return summary(self.model)

    def draw(self, sampling: Sampling | TextSampling, stop: str) -> list[Drawn]:
        """Return the images dense, accelerated, and by a stop.

        Args:
            sampling: the request, as `subject` returns it.
            stop: a name in `stops`.

        Raises:
            ValueError: an unknown stop.
        """
        if stop not in self.stops:
            raise ValueError(f"stop: expected one of {list(self.stops)}, got {stop!r:.100}")
        columns = min(COLUMNS, len(sampling.labels))
        in_grid = functools.partial(as_grid, columns=columns, least=SIDE * COLUMNS // columns)
        with unpatched(self.model):
            dense, seconds, _ = self._timed(sampling)
            drawn = [Drawn("dense", in_grid(dense), seconds, (summary(self.model),))]
        for title, config, file in (
            ("accelerated", DENSE, None),
            (stop, self._configs[stop], self._adapters[stop]),
        ):
            with patched_silently(self.model, config, file):
                images, seconds, records = self._timed(sampling)
                near = f"PSNR {psnr(images, dense):.1f} dB, SSIM {ssim(images, dense):.3f} to dense"
                faster = f"{drawn[0].seconds / seconds:.2f}x as fast as dense"
                lines = (faster, near, *summary(self.model).splitlines())
                tinted = tinted_by_updates(images, records)
            grid = None if tinted is None else in_grid(tinted)
            drawn.append(Drawn(title, in_grid(images), seconds, lines, grid))
        return drawn

    def _timed(self, sampling: Sampling | TextSampling) -> tuple[torch.Tensor, float, list[BlockRecord]]:
        """Return the images of the model as it is, the seconds of a second sample, and the records of the first."""
        if is_patched(self.model):
            with record(self.model) as records:
                images = sampling.run(self.model)
        else:
            images, records = sampling.run(self.model), []
        return images, seconds_of(lambda: sampling.run(self.model), device_of(self.model)), records
