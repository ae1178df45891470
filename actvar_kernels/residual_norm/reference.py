"""The step between attention and FFN in plain PyTorch: what the operations compute."""

from __future__ import annotations

import torch

from actvar_kernels.expert_ffn.reference import route_experts
from actvar_kernels.token_select.reference import normalize_modulate


def add_normalize(
    rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (rows + gamma * update).to(rows.dtype)
    return rows, normalize_modulate(rows, scale, shift)


def add_normalize_route(
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, u = add_normalize(rows, update, gamma, scale, shift)
    return rows, u, *route_experts(u, weight, bias, active)
