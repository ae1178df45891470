"""Compute the share of (tile, expert) blocks that a tile list runs, for routing that fake tensors do not carry."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from actvar_kernels.expert_ffn.reference import sort_key

EXPERTS, ACTIVE = 16, 12
SKIPS = ("measured", "random")


def share_of_blocks(mask: torch.Tensor, rows: int) -> float:
    """Return the share of blocks that run when tokens are sorted by their experts `[T, N]` and cut into tiles."""
    ordered = mask[sort_key(mask).sort(stable=True).indices]
    return torch.stack([tile.any(dim=0) for tile in ordered.split(rows)]).float().mean().item()


def share_function(skip: str | float) -> Callable[[int, int], float]:
    """Return the share as a function of tokens and rows of a tile.

    Args:
        skip: `"random"`: every token draws 12 of 16 experts; `"measured"`: tokens draw masks that the bundled model's
            router chose; a number: the share that is left out.
    """
    if not isinstance(skip, str):
        return lambda tokens, rows: 1 - skip
    masks = _random_masks if skip == "random" else _measured_masks
    return functools.cache(lambda tokens, rows: _mean_share(masks(tokens), rows))


def _mean_share(masks: list[torch.Tensor], rows: int) -> float:
    return sum(share_of_blocks(mask, rows) for mask in masks) / len(masks)


def _random_masks(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    return [torch.zeros(tokens, EXPERTS, dtype=torch.bool).scatter_(1, scores.topk(ACTIVE).indices, True)]


def _measured_masks(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [mask[torch.randint(len(mask), (tokens,), generator=generator)] for mask in recorded_masks()]


@functools.cache
def recorded_masks() -> list[torch.Tensor]:
    """Return the expert masks `[T, N]` of each block of the bundled model at the last scale, for 8 images per class."""
    from actvar import load_pretrained, record

    _, var = load_pretrained("fashion-mnist", adapter="paper")
    with record(var) as records:
        var.autoregressive_infer_cfg(80, torch.arange(80) % 10, g_seed=0)
    return [found.mask.flatten(0, 1) for found in records if found.scale.is_last]
