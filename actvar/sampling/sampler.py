"""Draw pictures in one call: batches, seeds and progress, with PIL images as the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from actvar.families import family_of
from actvar.models.arguments import checked_integer
from actvar.sampling.request import Sampling, number_of_classes
from actvar.sampling.summary import summary
from actvar.utils.pictures import as_picture, pixel_values
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped


class Sampler:
    """Sample a VAR in batches.

    The model stays the caller's: it may be patched, or its patch removed, between two calls. Each image has a seed of
    its own, so it is the same in every batch size.

    Args:
        vae: the autoencoder of `var`.
        var: a VAR, dense or patched, which may be inside a wrapper.
        batch: images that are drawn at once.

    Raises:
        TypeError: a model of an unsupported kind or of texts, or a batch that is no integer.
        ValueError: the autoencoder is not that of `var`, or a batch below 1.
    """

    def __init__(self, vae: Any, var: Any, batch: int = 8):
        self.var, self.batch = var, checked_integer("batch", batch, 1)
        model = unwrapped(var)
        number_of_classes(model)
        if family_of(model).autoencoder(model) is not vae:
            raise ValueError("vae: expected the autoencoder that var decodes by, got another one")

    def __call__(
        self,
        labels: Sequence[int],
        seeds: Sequence[int] | int = 0,
        *,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
    ) -> list[Image.Image]:
        """Return a picture per label, grey or RGB.

        Args:
            labels: classes.
            seeds: a seed per label, or the first of consecutive ones.
            cfg: guidance strength.
            top_k, top_p: filters of the tokens, as in `VAR.autoregressive_infer_cfg`.

        Raises:
            TypeError, ValueError: an argument of a wrong type or out of its range, or seeds that are not one per label.
        """
        first = Sampling(tuple(labels), cfg, top_k, top_p, seeds if isinstance(seeds, int) else tuple(seeds))
        each = tuple(first.seed + i for i in range(len(first.labels))) if isinstance(first.seed, int) else first.seed
        if len(each) != len(first.labels):
            raise ValueError(f"seeds: expected one per label, {len(first.labels)} of them, got {len(each)}")
        pictures = []
        for start in progress(range(0, len(each), self.batch), desc="sampling"):
            part = slice(start, start + self.batch)
            images = Sampling(first.labels[part], first.cfg, first.top_k, first.top_p, each[part]).run(self.var)
            pictures += [as_picture(pixels) for pixels in pixel_values(images).permute(0, 2, 3, 1).cpu().numpy()]
        return pictures

    def summary(self) -> str:
        """Return how the model samples now, see `actvar.summary`."""
        return summary(self.var)
