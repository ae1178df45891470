"""Prepare what the layers of a patched block are called with."""

from __future__ import annotations

from typing import Any

import torch

from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused, expert_ffn, static_ffn
from actvar_kernels.triton_backend.row_form import ByteRows


def in_dtype(rows: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return `rows` in the dtype of `Family.layer_dtype`, or in their own where that is None."""
    return rows if dtype is None else rows.to(dtype)


def quantized_ffn(block: Any, u: torch.Tensor | ByteRows) -> torch.Tensor:
    """Return the whole FFN of `u` `[R, K, C]` in eight bits.

    In C++ it runs as experts that are all on: they share a packed copy.
    """
    experts, quantized = block.actvar.shared.config.num_experts, block.actvar.quantized
    weights = block.actvar.family.ffn_weights(block)
    if isinstance(u, ByteRows) or choose_fused(u).fuses_residual:
        return static_ffn(u, experts, experts, *weights, quantized=quantized)
    every = u.new_ones(*u.shape[:-1], experts, dtype=torch.bool)
    return expert_ffn(u, every, experts, *weights, quantized=quantized)


def first_experts(block: Any, u: torch.Tensor | ByteRows, scale: Scale) -> torch.Tensor:
    """Return the output `[R, K, C]` of the first experts for rows `u` `[R, K, C]` of a scale with static experts."""
    experts, weights = block.actvar.shared.config.num_experts, block.actvar.family.ffn_weights(block)
    return static_ffn(u, scale.experts, experts, *weights, quantized=block.actvar.quantized)
