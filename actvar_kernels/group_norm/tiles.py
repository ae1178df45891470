"""Choose the tiles of GroupNorm, which say in how many parts an image is measured. This file does without Triton."""

from __future__ import annotations

from typing import NamedTuple


class GroupNormTiles(NamedTuple):
    """Describe GroupNorm of images.

    Attributes:
        channels: channels of a program.
        rows: positions at a time.
        loads: turns in which sums take these positions.
        parts: parts of an image for sums.
        part: positions of a part.
    """

    channels: int
    rows: int
    loads: int
    parts: int
    part: int


def group_norm_tiles(images: int, positions: int, width: int) -> GroupNormTiles:
    """Return tiles of GroupNorm with 32 numbers a thread, in as many turns as there are loads of 16 bytes.

    There is no padding where a power of two from 16 on divides the width.

    Args:
        images: number of images.
        positions: pixels of an image.
        width: channels of a pixel.
    """
    channels = width & -width
    channels = min(128, channels if channels >= 16 else _power_of_2(width))
    rows = 4096 // channels
    parts = min(256, max(1, 8192 * channels // (images * width)), -(-positions // rows))
    part = -(-positions // parts // rows) * rows
    return GroupNormTiles(channels, rows, 4, -(-positions // part), part)


def _power_of_2(number: int) -> int:
    """Return the next power of two from `number` on."""
    return 1 << (number - 1).bit_length()
