"""Time one block of a model at its last scale, with random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.models import build_vae_var
from actvar.patching.patch import accelerate, patch_silently
from actvar.sampling.timing import seconds_of
from actvar_kernels.operations.shapes import SIZES

WAYS = ("dense", "accelerated", "ActVAR")


@torch.no_grad()
def last_scale_seconds(
    way: str, model: str, batch: int, device: str, dtype: torch.dtype, weights: str | None = None
) -> float:
    """Return the seconds of one block at the last scale, after all scales before it have filled its K/V cache.

    Args:
        way: one of `WAYS`.
        model: a name of `SIZES`.
        batch: images, with two rows each.
        device: where the block runs.
        dtype: of the block.
        weights: as in `Execution`, for ActVAR.
    """
    var = one_block(way, model, device, dtype, weights)
    modulation, maps = scales(model, batch, device, dtype)
    block: Any = var.get_submodule("blocks.0")
    block.attn.kv_caching(True)
    try:
        for tokens in maps[:-1]:
            block(tokens.clone(), modulation, None)
        last = maps[-1].clone()
        return seconds_of(lambda: block(last, modulation, None), last.device)
    finally:
        block.attn.kv_caching(False)


@functools.cache
def one_block(way: str, model: str, device: str, dtype: torch.dtype, weights: str | None) -> nn.Module:
    """Build a transformer of one block of an official width, with random weights and the smallest autoencoder.

    Arguments are those of `last_scale_seconds`.
    """
    width, sides = SIZES[model]
    small = dict(V=64, ch=32, ch_mult=(1,), num_res_blocks=1, num_classes=10)
    _, var = build_vae_var(depth=1, width=width, patch_nums=sides, **small)
    var.to(device, dtype)
    if way == "accelerated":
        accelerate(var)
    elif way == "ActVAR":
        patch_silently(var, ActVARConfig(), Execution(weights=weights))
    return var


@functools.cache
def scales(model: str, batch: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what a block gets: the condition `[2 batch, C]`, and random tokens `[2 batch, side^2, C]` by scale."""
    width, sides = SIZES[model]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return normal(2 * batch, width), [normal(2 * batch, side * side, width) for side in sides]
