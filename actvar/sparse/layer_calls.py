"""Prepare what the layers of a patched block are called with."""

from __future__ import annotations

from typing import Any

import torch

from actvar.families.base import MODULATION
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused, expert_ffn, static_ffn
from actvar_kernels.backend import Backend
from actvar_kernels.linear.few_rows import few_rows_pay
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


def takes_few_rows(block: Any, x: torch.Tensor, scale: Scale, backend: Backend) -> bool:
    """Return whether a block runs in 5 launches: it is dense, and a measured table says so for as few rows.

    Kernels read all of its layers, in the dtype of the rows, without gradients, autocast or a compiler.

    Args:
        block: a patched block.
        x: rows of the residual stream, `[R, L, C]`.
        scale: the scale of the rows.
        backend: what the block runs on.
    """
    state = block.actvar
    family = state.family
    if scale.active or backend.name != "triton" or state.quantized is not None or not family.takes_few_rows:
        return False
    if family.has_between or state.called.keys() - {MODULATION} or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if not few_rows_pay(x, hidden=len(family.ffn_weights(block)[1])):
        return False
    return all(tensor.dtype == x.dtype for layer in family.four_layers(block) for tensor in layer)
