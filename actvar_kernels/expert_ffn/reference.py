"""Define the expert FFN in plain PyTorch."""

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
    """Return what `op.expert_ffn` does."""
    hidden = F.gelu(F.linear(u, fc1_weight, fc1_bias), approximate="tanh")
    by_expert = hidden.unflatten(-1, (mask.shape[-1], -1))
    if mask.dtype == torch.bool:
        by_expert.masked_fill_(~mask.unsqueeze(-1), 0)
    else:
        by_expert = by_expert * mask.unsqueeze(-1).to(hidden.dtype)
    return F.linear(by_expert.flatten(-2), fc2_weight, fc2_bias)


def sort_key(mask: torch.Tensor) -> torch.Tensor:
    """Return keys by which tokens with the same experts come together.

    A key is the mask as a number, expert 0 its highest bit, read as a Gray code. Tokens with equal experts get equal
    keys. Neighbouring keys differ in few experts.

    Args:
        mask: `[T, N]` bool, N <= 32.

    Returns:
        `[T]` int64.
    """
    bits = mask.to(torch.int64)
    return (bits.cumsum(dim=-1) % 2 * 2 ** torch.arange(mask.shape[-1] - 1, -1, -1, device=mask.device)).sum(dim=-1)
