"""Define the expert FFN in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.linear.quantized import quantized_linear, quantized_product


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


def quantized_expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    quantized: torch.dtype,
) -> torch.Tensor:
    """Return what `op.expert_ffn` does in eight bits, for a bool mask; `quantized` is int8 or float8_e4m3fn.

    Hidden units are float32 before GELU and have u's dtype after it. Those that are off are zeros when a row is
    quantized, so they have no part in its scale.
    """
    hidden = F.gelu(quantized_product(u, fc1_weight, fc1_bias, quantized), approximate="tanh").to(u.dtype)
    by_expert = hidden.unflatten(-1, (mask.shape[-1], -1)).masked_fill(~mask.unsqueeze(-1), 0)
    return quantized_linear(by_expert.flatten(-2), fc2_weight, fc2_bias, quantized)


def static_ffn(
    u: torch.Tensor,
    units: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    """Return what `static.static_ffn` does, with the first `units` hidden units."""
    hidden = F.gelu(F.linear(u, fc1_weight[:units], fc1_bias[:units]), approximate="tanh")
    return F.linear(hidden, fc2_weight[:, :units], fc2_bias)


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
