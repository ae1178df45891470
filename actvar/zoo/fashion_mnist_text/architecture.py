"""Sizes of the bundled model of texts."""

from __future__ import annotations

from actvar.models.build import give_weights
from actvar.models.infinity import Infinity, InfinityTokenizer
from actvar.models.infinity.build import infinity_skeleton
from actvar.models.infinity.schedules import Schedule

SQUARE: Schedule = [(1, side, side) for side in (1, 2, 4, 6, 8)]
WIDE: Schedule = [(1, 1, 1), *((1, side, 2 * side) for side in (2, 4, 6, 8))]
"""Maps of an image of one garment, 32x32 pixels, and of two garments side by side, 32x64 pixels."""
MOST_WORDS = 16
TOKEN_PIXELS = 4
"""Pixels along each side of a token."""
DRAW: dict[str, float] = dict(cfg=1.5, tau=1.0, top_k=0, top_p=0.0)
"""Say how bits are drawn unless something else is asked for, as arguments of `Infinity.sample`."""


def nearest_schedule(ratio: float) -> Schedule:
    """Return the schedule whose images are nearest to a ratio, height divided by width."""
    return min((SQUARE, WIDE), key=lambda schedule: abs(schedule[-1][1] / schedule[-1][2] - ratio))


def build(seed: int = 0, device: str = "cpu") -> tuple[InfinityTokenizer, Infinity]:
    """Return a new tokenizer with 4x downsampling, and a new transformer.

    Args:
        seed: of the initial weights.
        device: `"cpu"`, or `"meta"` for shapes without weights.
    """
    tokenizer, infinity = infinity_skeleton(
        bits=10,
        spatial_patchify=False,
        depth=5,
        embed_dim=160,
        num_heads=5,
        block_chunks=1,
        text_channels=64,
        text_maxlen=MOST_WORDS,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
    )
    if device != "meta":
        give_weights((tokenizer, infinity), device, seed)
    return tokenizer, infinity
