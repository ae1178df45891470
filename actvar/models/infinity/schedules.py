"""List the scale schedules of Infinity: the size of the token map of every scale, by aspect ratio and image size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actvar.models.arguments import checked_finite
from actvar_kernels.checks import as_integer, as_items

Schedule = list[tuple[int, int, int]]
"""One `(1, h, w)` per scale; the first number counts frames."""

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Number of scales by the number of pixels of the image, in the names of the public code."""

_TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _all_maps() -> dict[float, tuple[tuple[int, int], ...]]:
    """Return the maps `(h, w)` of all 13 scales by aspect ratio, with the inverse ratios cut to three digits."""
    maps = {}
    for ratio, text in _TALL.items():
        tall = tuple((int(h), int(w)) for h, w in (size.split("x") for size in text.split()))
        maps[ratio] = tall
        maps[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in tall)
    return maps


_MAPS = _all_maps()

ASPECTS = tuple(sorted(_MAPS))
"""Aspect ratios, height by width."""


def nearest_aspect(ratio: float) -> float:
    """Return the one of `ASPECTS` that is nearest to a height divided by a width."""
    return min(ASPECTS, key=lambda aspect: abs(aspect - ratio))


def scale_schedule(aspect: float = 1.0, size: str = "1M") -> Schedule:
    """Return the schedule of images of an aspect ratio and a size.

    Args:
        aspect: height divided by width; the nearest of `ASPECTS` is taken.
        size: one of `SIZES`, the number of pixels.

    Returns:
        `(1, h, w)` of every token map; a token stands for 16x16 pixels.

    Raises:
        TypeError: an aspect that is no number.
        ValueError: an aspect that is not positive, or a size that is none of `SIZES`.
    """
    aspect = checked_finite("aspect", aspect)
    if aspect <= 0:
        raise ValueError(f"aspect: expected a positive number, height by width, got {aspect}")
    if size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    return [(1, h, w) for h, w in _MAPS[nearest_aspect(aspect)][: SIZES[size]]]


def largest_map(schedule: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the largest map `(h, w)` of the aspect ratio that is nearest to that of a schedule's last map."""
    _, h, w = schedule[-1]
    return _MAPS[nearest_aspect(h / w)][-1]


def checked_schedule(schedule: object, most: int) -> Schedule:
    """Return a schedule with Python's own numbers.

    Args:
        schedule: a sequence of `(1, h, w)`.
        most: the number of scales that the model has embeddings for.

    Raises:
        TypeError: no sequence of triples of integers.
        ValueError: no scale or too many, a first map that is not 1x1, more than one frame, or a map that is smaller
            than the one before.
    """
    wanted = "a sequence of (1, h, w), as scale_schedule() returns it"
    scales = as_items(schedule)
    if scales is None:
        raise TypeError(f"schedule: expected {wanted}, got {type(schedule).__name__}")
    if not 1 <= len(scales) <= most:
        raise ValueError(f"schedule: expected from 1 to {most} scales, got {len(scales)}")
    checked: Schedule = []
    for scale in scales:
        sides = as_items(scale)
        if sides is None or len(sides) != 3:
            raise TypeError(f"schedule: expected {wanted}, got {scale!r:.100} in it")
        frames, h, w = (as_integer("schedule", side) for side in sides)
        _, last_h, last_w = checked[-1] if checked else (1, 1, 1)
        if frames != 1 or (not checked and (h, w) != (1, 1)) or h < last_h or w < last_w:
            raise ValueError(
                f"schedule: expected {wanted}, that starts with (1, 1, 1) and whose maps do not become smaller, "
                f"got {(frames, h, w)} as number {len(checked)}"
            )
        checked.append((frames, h, w))
    return checked


def tokens_of(schedule: Sequence[tuple[int, int, int]]) -> list[int]:
    """Return the number of tokens of every scale."""
    return [h * w for _, h, w in schedule]


def levels_and_mask(schedule: Schedule, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every token's number of its scale, `[L]` int64, and the mask `[L, L]` that adds -inf at later scales."""
    counts = tokens_of(schedule)
    level = torch.arange(len(schedule), device=device)
    level = level.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))
    mask = torch.zeros(len(level), len(level), device=device)
    return level, mask.masked_fill_(level[:, None] < level, -torch.inf)
