"""Say by formula what memory a sample of Infinity needs, part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from actvar.config import DENSE, ActVARConfig
from actvar.families import blocks_of, family_of
from actvar.models import Infinity
from actvar.models.infinity.layers import hidden_of
from actvar.models.infinity.schedules import Schedule
from actvar.sparse.schedule import Scale, build_schedule
from actvar.utils.live_memory import peak_live_bytes

CALIBRATED = 16
"""Samples that `actvar calibrate` fits to by default."""


def memory_by_part(
    infinity: Infinity, schedule: Schedule, batch: int, text_tokens: int, config: ActVARConfig = DENSE, width: int = 2
) -> dict[str, int]:
    """Return the bytes of each part of a sample with guidance on the logits.

    Keys and values are those of the scale at which they are the most. The public code keeps those of the last scale
    too, and keys in float32; that line is about the dense model. Activations are the residual stream in float32, a
    layer's input and its results, in one block at the widest scale. The decoder's are the most that its operators
    have at once, counted. With `Execution(weights=...)` the bytes of the weights and their scales come beside the
    weights, on a GPU as on a CPU. Memory inside operators is in none of the parts. The last part is that of
    `actvar.calibrate`, which draws and fits sample after sample.

    Args:
        infinity: a model with its tokenizer on the meta device.
        schedule, batch, text_tokens, config: as in `infinity_flops`.
        width: bytes of a number in the blocks; numbers outside of them have four.
    """
    C, depth, tokenizer = infinity.C, infinity.depth, family_of(infinity).autoencoder(infinity)
    blocks = sum(parameter.numel() for block in infinity.unregistered_blocks for parameter in block.parameters())
    around = sum(parameter.numel() for parameter in infinity.parameters()) - blocks
    plans = {"dense": _plans(DENSE, schedule, depth), "own": _plans(config, schedule, depth)}
    keys = {name: [_keys(plan, batch, config.kv) for plan in of_way] for name, of_way in plans.items()}
    return {
        "weights of the blocks": width * blocks,
        "their copies, with int8 or fp8": eight_bit_bytes(infinity),
        "other weights of the transformer": 4 * around,
        "weights of the tokenizer": sum(parameter.nbytes for parameter in tokenizer.parameters()),
        "K/V as the public code keeps them": max(keys["dense"]) * C * (4 + width),
        "K/V of all scales": max(keys["own"]) * C * 2 * width,
        "K/V without the last scale's": max(keys["own"][:-1], default=0) * C * 2 * width,
        "K/V of the texts": depth * 2 * batch * text_tokens * C * 2 * width,
        "activations of a block": max(_activations(plan, batch, C, width) for plan in plans["own"]),
        "activations of the decoder": decoder_bytes(infinity, schedule, batch),
        f"calibrate, streams of {CALIBRATED} samples": calibration_bytes(infinity, schedule, CALIBRATED, width),
    }


def eight_bit_bytes(model: nn.Module) -> int:
    """Return the bytes that products in eight bits keep beside the weights: a byte a number, four a scale.

    A weight of a block has a scale for each output.

    Args:
        model: of any family, also on the meta device.
    """
    family = family_of(model)
    weights = [
        weight
        for block in blocks_of(model)
        for weight in (*family.packed_weights(block), family.ffn_weights(block)[2])
        if weight is not None
    ]
    return sum(weight.numel() + 4 * len(weight) for weight in weights)


def calibration_bytes(infinity: Infinity, schedule: Schedule, images: int, width: int) -> int:
    """Return the bytes of what `actvar.calibrate` keeps of all samples at a block.

    It is the block's input and output in float32, and the FFN's input in the dtype of the blocks.

    Args:
        infinity, schedule, width: as in `memory_by_part`.
        images: samples that are fitted to.
    """
    return 2 * images * sum(h * w for _, h, w in schedule) * infinity.C * (4 + 4 + width)


def _plans(config: ActVARConfig, schedule: Schedule, depth: int) -> list[tuple[Scale, ...]]:
    """Return the plan of every block, scale by scale."""
    maps = [(h, w) for _, h, w in schedule]
    return list(zip(*(build_schedule(config, maps, block) for block in range(depth)), strict=True))


def _rows(plan: Sequence[Scale], batch: int) -> int:
    """Return the number of rows of a scale."""
    return 2 * batch if plan[0].guided else batch


def _keys(plan: Sequence[Scale], batch: int, kv: str) -> int:
    """Return how many keys all rows and blocks have together at the end of a scale."""
    own = [scale.keep if kv == "compact" else scale.tokens for scale in plan]
    return _rows(plan, batch) * sum(scale.cached_before + count for scale, count in zip(plan, own, strict=True))


def _activations(plan: Sequence[Scale], batch: int, C: int, width: int) -> int:
    """Return the bytes of the residual stream and of the widest layer's input and results.

    These are the FFN's hidden units, or queries, keys, values and their output.
    """
    kept, results = max(scale.keep for scale in plan), max(hidden_of(C), 4 * C)
    return _rows(plan, batch) * (4 * plan[0].tokens * C + width * kept * (C + results))


@torch.no_grad()
def decoder_bytes(infinity: Infinity, schedule: Schedule, batch: int) -> int:
    """Return the most bytes that the decoder's operators have at once, for a tokenizer on the meta device."""
    tokenizer, (_, h, w) = family_of(infinity).autoencoder(infinity), infinity.tokenizer_schedule(schedule)[-1]
    features = torch.empty(batch, tokenizer.bits, h, w, device="meta")
    return peak_live_bytes(lambda: infinity.decode(features))
