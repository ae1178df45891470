"""Define in plain PyTorch what lies between the autoencoder's convolutions."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `op.group_norm_silu` does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if offset is not None:
        y = y + offset.to(dtype)[:, None, None]
    y = F.group_norm(y, groups, weight.to(dtype), bias.to(dtype), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


def add_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return what `op.add_residual` does."""
    stored = torch.promote_types(x.dtype, update.dtype)
    dtype = torch.promote_types(stored, torch.float32)
    return (x.to(dtype) + (update.to(dtype) + bias.to(dtype)[:, None, None])).to(stored)
