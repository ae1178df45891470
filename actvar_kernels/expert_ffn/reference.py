"""The expert FFN in plain PyTorch: what the operation computes."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    hidden = F.gelu(F.linear(u, fc1_weight, fc1_bias), approximate="tanh")
    by_expert = hidden.unflatten(-1, (mask.shape[-1], -1))
    if mask.dtype == torch.bool:
        by_expert.masked_fill_(~mask.unsqueeze(-1), 0)
    else:
        by_expert = by_expert * mask.unsqueeze(-1).to(hidden.dtype)
    return F.linear(by_expert.flatten(-2), fc2_weight, fc2_bias)


SNAP_TILE, SNAP_SEGMENT = 128, 4096
"""Tokens that share their experts under `"snap"`, and tokens that are sorted together for it."""


def sort_key(mask: torch.Tensor) -> torch.Tensor:
    """Key `[T]` of the tokens with expert masks `[T, N]`, N <= 32: the mask as a number, expert 0 its highest bit, read
    as a Gray code. Tokens with equal experts get equal keys, and neighbouring keys differ in few experts."""
    bits = mask.to(torch.int64)
    return (bits.cumsum(dim=-1) % 2 * 2 ** torch.arange(mask.shape[-1] - 1, -1, -1, device=mask.device)).sum(dim=-1)


def snapped(mask: torch.Tensor, active: int) -> torch.Tensor:
    """Masks `[..., N]` after `"snap"`: every 4096 tokens, in the order of `sort_key` (ties: their own order), are cut
    into tiles of 128, and each token gets the `active` experts that most tokens of its tile want (ties: the lower
    expert)."""
    flat = mask.flatten(0, -2)
    snapped = torch.empty_like(flat)
    for first in range(0, len(flat), SNAP_SEGMENT):
        order = first + sort_key(flat[first : first + SNAP_SEGMENT]).sort(stable=True).indices
        for tile in order.split(SNAP_TILE):
            wanted = flat[tile].sum(dim=0).sort(descending=True, stable=True).indices[:active]
            snapped[tile] = torch.zeros_like(flat[0]).index_fill_(0, wanted, True)
    return snapped.view_as(mask)
