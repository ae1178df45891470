"""Define in plain PyTorch the step between attention and FFN."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.routing.reference import route_experts
from actvar_kernels.token_select.reference import gather_rows, normalize_modulate


class AdaLN(NamedTuple):
    """Name vectors of AdaLN, each `[R, 1, C]`: the gate of a branch that ends, scale and shift of one that begins."""

    gamma: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


class Residual(NamedTuple):
    """Stand for rows `x[r, index[r, j]] + gamma[r] * update[r, j]` that are not computed yet.

    Attributes:
        x: `[R, L, C]`, floating-point; its rows are taken by an index `[R, K]`, or all without one.
        update: `[R, K, C]`, floating-point.
        gamma: `[R, 1, C]`, floating-point.
    """

    x: torch.Tensor
    update: torch.Tensor
    gamma: torch.Tensor

    def rows(self, index: torch.Tensor | None) -> torch.Tensor:
        """Return the rows `[R, K, C]` in x's dtype, for an index `[R, K]` int64 or None."""
        rows = self.x if index is None else gather_rows(self.x, index)
        return (rows + self.gamma * self.update).to(self.x.dtype)


class Gated(NamedTuple):
    """Name the rows that the output of a layer is added to, and the gate that it is multiplied with.

    Attributes:
        rows: `[R, K, C]`, floating-point.
        gamma: `[R, 1, C]`, floating-point.
    """

    rows: torch.Tensor
    gamma: torch.Tensor


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and its LayerNorm with modulation, see `op.add_normalize`."""
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
    """Return the sum, its LayerNorm with modulation, mask and logits, see `op.add_normalize_route`."""
    rows, u = add_normalize(x, index, update, gamma, scale, shift)
    return rows, u, *route_experts(u, weight, bias, active)
