"""The step between attention and FFN in plain PyTorch: what the operations compute."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.routing.reference import route_experts
from actvar_kernels.token_select.reference import gather_rows, normalize_modulate


class Residual(NamedTuple):
    """Rows `x[r, index[r, j]] + gamma[r] * update[r, j]` that are not computed yet: of x `[R, L, C]` by an index
    `[R, K]`, None for all; update `[R, K, C]`; gamma `[R, 1, C]`."""

    x: torch.Tensor
    update: torch.Tensor
    gamma: torch.Tensor

    def rows(self, index: torch.Tensor | None) -> torch.Tensor:
        """`[R, K, C]` in x's dtype."""
        rows = self.x if index is None else gather_rows(self.x, index)
        return (rows + self.gamma * self.update).to(self.x.dtype)


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Residual(x, update, gamma).rows(index)
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
