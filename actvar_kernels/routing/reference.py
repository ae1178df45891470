"""Define the router's choice of experts in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mask and logits, see `op.route_experts`."""
    with torch.autocast(u.device.type, enabled=False):
        logits = F.linear(u.float(), weight.float(), bias.float())
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :active]
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, 1)
    return mask, logits
