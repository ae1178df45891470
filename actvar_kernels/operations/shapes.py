"""Give sizes of the official models, and of one scale as the operations of a block see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

HEAD_DIM, EXPERTS, ACTIVE_EXPERTS, VOCABULARY = 64, 16, 12, 4096
NORM_GROUPS = 32
GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ShapeCase(NamedTuple):
    """Count the tokens of a scale, those that are kept, and cached rows before the scale."""

    tokens: int
    keep: int
    cached: int


class Model(NamedTuple):
    """Give width and token map sides of a model."""

    width: int
    sides: tuple[int, ...]

    def active_scales(self, rate: float = 0.75) -> tuple[ShapeCase, ShapeCase]:
        """Return the last two scales, of which `rate` of the tokens is kept."""
        *dense, before, last = (side * side for side in self.sides)
        cached, kept = sum(dense), share(rate, before)
        return ShapeCase(before, kept, cached), ShapeCase(last, share(rate, last), cached + kept)


def share(rate: float, count: int) -> int:
    """Return the nearest number to `rate * count`, and at least 1."""
    return max(1, int(rate * count + 0.5))


_SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
MODELS = {
    "d16": Model(1024, _SIDES_256),
    "d20": Model(1280, _SIDES_256),
    "d24": Model(1536, _SIDES_256),
    "d30": Model(1920, _SIDES_256),
    "d36": Model(2304, _SIDES_512),
}
_SIDES_1024 = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
INFINITY, INFINITY_HEAD_DIM = {"infinity-2b": Model(2048, _SIDES_1024), "infinity-8b": Model(3584, _SIDES_1024)}, 128
"""The published Infinity models at 1024x1024 pixels, whose residual stream is float32."""
SIZES = MODELS | {"fashion-mnist": Model(192, (1, 2, 3, 4, 6, 8))}
"""The official models and the bundled one."""


@dataclass(frozen=True)
class BlockShape:
    """Describe a block at one active scale.

    Attributes:
        rows: sequences R.
        tokens: tokens L of a sequence.
        keep: tokens K that are updated.
        cached: keys P before the scale.
        width: channels C.
        num_experts: experts N.
        active: experts that are on for a token.
        head_dim: size of a head.
    """

    rows: int
    tokens: int
    keep: int
    cached: int
    width: int
    num_experts: int = EXPERTS
    active: int = ACTIVE_EXPERTS
    head_dim: int = HEAD_DIM


def last_scale(model: str, batch: int, rate: float = 0.75) -> BlockShape:
    """Return the last scale of a model, two rows an image, with `rate` of tokens and experts at the last two scales.

    It has 16x16 tokens, 32x32 for d36, and 8x8 for fashion-mnist.
    """
    scale = SIZES[model].active_scales(rate)[1]
    return BlockShape(2 * batch, *scale, SIZES[model].width, active=share(rate, EXPERTS))


def dense_scales(model: str, batch: int, most_rows: int) -> list[BlockShape]:
    """Return the scales of a model with up to `most_rows` rows of all sequences, two an image, and every token kept."""
    width, sides = SIZES[model]
    counts = [side * side for side in sides]
    shapes = (
        BlockShape(2 * batch, count, count, sum(counts[:index]), width, active=EXPERTS)
        for index, count in enumerate(counts)
    )
    return [shape for shape in shapes if shape.rows * shape.tokens <= most_rows]
