"""Routing and the expert FFN in plain PyTorch: what the operations compute."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        logits = F.linear(u.float(), weight.float(), bias.float())
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :active]
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
    return mask, logits


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
