"""Draw token maps from the dense model itself, in place of a data set."""

from __future__ import annotations

from typing import Any

import torch

from actvar.config import DENSE
from actvar.families import family_of
from actvar.families.conditions import Batch, Conditions, Texts
from actvar.patching.patch import patched_silently
from actvar.sampling.request import number_of_classes
from actvar.utils.devices import device_of
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped


@torch.no_grad()
def sampled_inputs(
    var: Any, images: int, batch: int, seed: int = 0, cfg: float = 1.5, texts: Texts | None = None
) -> list[Batch]:
    """Return batches of labels `[B]` int64 and inputs `[B, L - first_l, Cvae]` float32 for teacher forcing.

    Sampling feeds these inputs to the word embedding, scale by scale. No image is decoded.

    Args:
        var: the model, dense or patched.
        images: samples to draw.
        batch: samples per batch, B; the last batch may have fewer.
        seed: seed of the order of the classes; batch number b is drawn with `seed + b`.
        cfg: guidance strength.
        texts: of a model that draws from texts, which take the place of labels; None for classes.

    Raises:
        TypeError: no texts for a model that draws from texts, or texts for another one.
    """
    conditions = spread(var, images, seed, texts)
    batches = []
    for index, start in enumerate(progress(range(0, images, batch), desc="sampling")):
        of_batch = conditions[start : start + batch]
        token_maps = drawn_token_maps(var, of_batch, seed + index, cfg)
        batches.append((of_batch, family_of(var).teacher_input(var, of_batch, token_maps)))
    return batches


def first_conditions(var: Any, images: int, texts: Texts | None) -> Conditions:
    """Return conditions of images on the device of `var`: the first classes or texts, and then these again.

    Raises:
        TypeError, ValueError: see `spread`.
    """
    numbers = torch.arange(images, device="cpu") % number_of_conditions(var, texts)
    return _numbered(var, numbers, texts)


def spread(var: Any, images: int, seed: int, texts: Texts | None) -> Conditions:
    """Return conditions of images on the device of `var`: all classes or texts, spread evenly and shuffled.

    Raises:
        TypeError, ValueError: see `sampled_inputs`; no text at all.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(images, generator=generator, device="cpu")
    numbers = (torch.arange(images, device="cpu") * number_of_conditions(var, texts) // images)[order]
    return _numbered(var, numbers, texts)


def number_of_conditions(var: Any, texts: Texts | None) -> int:
    """Return the number of texts, or of the model's classes without texts.

    Raises:
        TypeError, ValueError: as in `spread`.
    """
    if texts is None:
        return number_of_classes(var)
    if not family_of(unwrapped(var)).draws_from_texts:
        raise TypeError(f"texts: expected None, since {type(unwrapped(var)).__name__} draws from classes")
    if not len(texts):
        raise ValueError("texts: expected at least one, got none")
    return len(texts)


def _numbered(var: Any, numbers: torch.Tensor, texts: Texts | None) -> Conditions:
    """Return the classes or texts with these numbers, on the device of `var`."""
    return (numbers if texts is None else texts.take(numbers.tolist())).to(device_of(var))


@torch.no_grad()
def drawn_token_maps(var: Any, conditions: Conditions, seed: int, cfg: float) -> torch.Tensor:
    """Return the tokens `[B, L]` int64, or bits `[B, L, bits]` uint8, that the dense model draws.

    No image is decoded.

    Args:
        var: the model, dense or patched.
        conditions: classes `[B]` int64 or texts, on the model's device.
        seed: seed of the sampling noise.
        cfg: guidance strength.
    """
    with patched_silently(var, DENSE, None):
        return family_of(var).token_maps(var, conditions, seed, cfg)
