"""Define the scatter in plain PyTorch."""

from __future__ import annotations

import torch

from actvar_kernels.token_select.reference import flat_index


def scatter_rows(
    base: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """Return what `op.scatter_rows` does, in new memory."""
    R, L, C = base.shape
    updated = torch.addcmul(rows, gamma.to(update.dtype), update).to(base.dtype)
    return base.reshape(R * L, C).index_put((flat_index(index, L),), updated).view(R, L, C)
