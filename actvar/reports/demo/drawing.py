"""Draw the same images dense, accelerated and by a stop of a slider, with times and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from actvar.config import DENSE
from actvar.evaluate.similarity import psnr, ssim
from actvar.flops import model_flops, total_flops
from actvar.models import VAR
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import patched_silently, unpatched
from actvar.reports.token_overlay import tinted_by_updates
from actvar.sampling.request import Sampling
from actvar.sampling.summary import summary
from actvar.sampling.timing import seconds_of
from actvar.sparse.state import BlockRecord, is_patched, record
from actvar.utils.devices import device_of
from actvar.utils.pictures import as_grid

COLUMNS = 5
"""Images in a row of the pictures."""


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
        var: the model, not patched.
        classes: names of its classes.
        adapters: files of the slider's stops by name; None is the dense model on the kernels.

    Attributes:
        stops: the names in `adapters`, sorted by the FLOPs that they save, the most at the end.
    """

    def __init__(self, var: VAR, classes: Sequence[str], adapters: Mapping[str, Path | None]):
        self.var, self.classes, self._adapters = var, tuple(classes), dict(adapters)
        self._configs = {
            name: DENSE if file is None else read_adapter_config(file) for name, file in self._adapters.items()
        }
        cost = {name: total_flops(model_flops(var, 1, config)) for name, config in self._configs.items()}
        self.stops = tuple(sorted(self._adapters, key=lambda name: -cost[name]))

    def describe(self, stop: str) -> str:
        """Return what a stop of the slider leaves out, as `actvar.summary` says it."""
        with patched_silently(self.var, self._configs[stop], self._adapters[stop]):
            return summary(self.var)

    def draw(self, label: int | None, seed: int, cfg: float, stop: str) -> list[Drawn]:
        """Return the images dense, accelerated, and by a stop.

        Args:
            label: the class of one image, or None for one image of each class.
            seed: of the noise.
            cfg: guidance strength.
            stop: a name in `stops`.

        Raises:
            TypeError, ValueError: as `actvar.sampling.request.Sampling`, or an unknown class or stop.
        """
        if stop not in self.stops:
            raise ValueError(f"stop: expected one of {list(self.stops)}, got {stop!r:.100}")
        if label is not None and label not in range(len(self.classes)):
            raise ValueError(f"label: expected a class of 0-{len(self.classes) - 1}, or None for all, got {label}")
        sampling = Sampling(tuple(range(len(self.classes))) if label is None else (label,), cfg, seed=seed)
        with unpatched(self.var):
            dense, seconds, _ = self._timed(sampling)
            drawn = [Drawn("dense", as_grid(dense, COLUMNS), seconds, (summary(self.var),))]
        for title, config, file in (
            ("accelerated", DENSE, None),
            (stop, self._configs[stop], self._adapters[stop]),
        ):
            with patched_silently(self.var, config, file):
                images, seconds, records = self._timed(sampling)
                near = f"PSNR {psnr(images, dense):.1f} dB, SSIM {ssim(images, dense):.3f} to dense"
                faster = f"{drawn[0].seconds / seconds:.2f}x as fast as dense"
                lines = (faster, near, *summary(self.var).splitlines())
                tinted = tinted_by_updates(images, records)
            grid = None if tinted is None else as_grid(tinted, COLUMNS)
            drawn.append(Drawn(title, as_grid(images, COLUMNS), seconds, lines, grid))
        return drawn

    def _timed(self, sampling: Sampling) -> tuple[torch.Tensor, float, list[BlockRecord]]:
        """Return the images of the model as it is, the seconds of a second sample, and the records of the first."""
        if is_patched(self.var):
            with record(self.var) as records:
                images = sampling.run(self.var)
        else:
            images, records = sampling.run(self.var), []
        return images, seconds_of(lambda: sampling.run(self.var), device_of(self.var)), records
