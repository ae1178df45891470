"""Define in plain PyTorch what lies between the autoencoder's convolutions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.group_norm.tiles import group_norm_tiles


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    offset: torch.Tensor | None,
    moments: torch.Tensor | None = None,
    part: int | None = None,
) -> torch.Tensor:
    """Return what `op.group_norm_silu` does; the moments follow from x."""
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


def add_residual_moments(
    x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `op.add_residual_moments` does."""
    out = add_residual(x, update, bias)
    B, C, H, W = x.shape
    if not x.numel():
        return out, torch.zeros(B, 2, 1, C, dtype=torch.float32, device=x.device)
    parts = out.detach().float().flatten(2).split(group_norm_tiles(B, H * W, C).part, dim=2)
    means = torch.stack([part.mean(dim=2) for part in parts], dim=1)
    deviations = torch.stack([(part - part.mean(dim=2, keepdim=True)).square().sum(dim=2) for part in parts], dim=1)
    return out, torch.stack((means, deviations), dim=1)
