"""Write captions of garments: what each is, and what its image shows, in varied words."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from actvar.zoo.fashion_mnist_text.prompts import NOUNS

ADJECTIVES = (
    (("dark", "black"), ("bright", "light", "white")),
    (("narrow", "slim"), ("wide", "broad")),
    (("plain",), ("patterned", "printed")),
)
"""Words for low and for high values of each attribute, as `attributes` orders them."""
OPENINGS = ("", "", "", "a photo of ", "a picture of ", "an image of ")
JOINTS = (" and ", " and ", " beside ", " next to ")
SHARES = (0.3, 0.2, 0.3)
"""Share of a class's images with a low value of each attribute, and with a high one."""
GARMENT, STRUCTURE = 0.1, 2
"""Brightness above which a pixel shows the garment, and how many of those a column has that belongs to it."""


def vocabulary() -> list[str]:
    """Return every word of the captions, in order."""
    words = [word for names in NOUNS for word in names]
    words += [word for attribute in ADJECTIVES for side in attribute for word in side]
    words += [*OPENINGS, *JOINTS, "a", "an", "the", "pair of"]
    return sorted({word for text in words for word in text.split()})


def attributes(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return -1, 0 or 1 for a low, a middling or a high value of each attribute among its class, `[N, 3]` int8.

    The attributes are brightness, width, and contrast within the garment.

    Args:
        images: `[N, 1, 32, 32]` in [0, 1].
        labels: classes `[N]`.
    """
    values, found = _values(images), torch.zeros(len(images), len(SHARES), dtype=torch.int8)
    for label in labels.unique():
        is_of_class = labels == label
        for number, share in enumerate(SHARES):
            of_class = values[is_of_class, number]
            low, high = torch.quantile(of_class, torch.tensor([share, 1 - share]))
            found[is_of_class, number] = (of_class > high).to(torch.int8) - (of_class < low).to(torch.int8)
    return found


def _values(images: torch.Tensor) -> torch.Tensor:
    """Return mean brightness, width in columns, and mean step between neighbours of each garment, `[N, 3]`."""
    is_garment = (images > GARMENT).float()
    size = is_garment.sum(dim=(1, 2, 3)).clamp_min(1)
    brightness = (images * is_garment).sum(dim=(1, 2, 3)) / size
    width = (is_garment.sum(dim=2) >= STRUCTURE).sum(dim=(1, 2)).float()
    inside = 1 - F.max_pool2d(1 - is_garment, 3, stride=1, padding=1)
    steps = (images - images.roll(1, 2)).abs() + (images - images.roll(1, 3)).abs()
    contrast = (steps * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp_min(1)
    return torch.stack((brightness, width, contrast), dim=1)


def caption(label: int, facts: Sequence[int], rng: random.Random) -> str:
    """Return a caption of one garment, which tells each of its attributes in half of the cases.

    Args:
        label: class.
        facts: -1, 0 or 1 of each attribute.
        rng: draws the words.
    """
    return rng.choice(OPENINGS) + _garment(label, facts, rng)


def caption_of_pair(labels: tuple[int, int], facts: tuple[Sequence[int], Sequence[int]], rng: random.Random) -> str:
    """Return a caption of two garments side by side, the left one first; arguments are as in `caption`."""
    left, right = (_garment(label, of_it, rng) for label, of_it in zip(labels, facts, strict=True))
    return rng.choice(OPENINGS) + left + rng.choice(JOINTS) + right


def _garment(label: int, facts: Sequence[int], rng: random.Random) -> str:
    """Return a garment with an article and adjectives."""
    known = [sides[fact > 0] for sides, fact in zip(ADJECTIVES, facts, strict=True) if fact]
    words = [rng.choice(names) for names in known if rng.random() < 0.5]
    rng.shuffle(words)
    text = " ".join([*words, rng.choice(NOUNS[label])])
    if text.endswith("s") and not text.endswith("ss"):
        return rng.choice(("", "a pair of ", "the ")) + text
    article = "an " if text[0] in "aeiou" else "a "
    return rng.choice((article, article, "the ", "")) + text
