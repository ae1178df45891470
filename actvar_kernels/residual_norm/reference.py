"""The step between attention and FFN in plain PyTorch: what the operations compute."""

from __future__ import annotations

import torch

from actvar_kernels.expert_ffn.reference import route_experts
from actvar_kernels.token_select.reference import gather_rows, normalize_modulate


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x if index is None else gather_rows(x, index)
    rows = (rows + gamma * update).to(x.dtype)
    return rows, normalize_modulate(rows, scale, shift)


def add_normalize_route(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, u = add_normalize(x, index, update, gamma, scale, shift)
    return rows, u, *route_experts(u, weight, bias, active)
