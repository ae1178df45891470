"""Run the experts in eight bits on Triton: all of them, and zeros for those that are off."""

from __future__ import annotations

import torch

from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.linear.eight_bits import multiply, multiply_scatter, quantize_rows
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.triton_backend.row_form import ByteRows


def hidden_rows(
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor | None,
    weights: FFNWeights,
    quantized: torch.dtype,
    recorded: bool,
) -> ByteRows:
    """Return the hidden units `[..., D]` in eight bits, as `reference.quantized_expert_ffn` has them.

    It takes a launch to quantize `u` where that is not done yet, one for the product with GELU, and one to quantize
    what is on of each row, since the largest number of a row is known when all of them are.

    Args:
        u: `[..., C]`, float32, float16 or bfloat16, or such rows in eight bits.
        mask: `[..., N]` bool, the experts that are on; None for all.
        weights: floating-point.
        quantized: the dtype of the numbers in eight bits, that of `u` where it is quantized.
        recorded: whether registered operators are called.
    """
    rows = u if isinstance(u, ByteRows) else quantize_rows(u, None, quantized, recorded)
    hidden = multiply(rows, weights.fc1_weight, weights.fc1_bias, with_gelu=True, recorded=recorded)
    return quantize_rows(hidden, mask, quantized, recorded)


def expert_ffn(
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor | None,
    weights: FFNWeights,
    quantized: torch.dtype,
    recorded: bool,
) -> torch.Tensor:
    """Return what `reference.quantized_expert_ffn` does; arguments are those of `hidden_rows`."""
    hidden = hidden_rows(u, mask, weights, quantized, recorded)
    return multiply(hidden, weights.fc2_weight, weights.fc2_bias, with_gelu=False, recorded=recorded)


def expert_ffn_scatter(
    out: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor | Residual,
    u: torch.Tensor | ByteRows,
    mask: torch.Tensor | None,
    weights: FFNWeights,
    gamma: torch.Tensor,
    quantized: torch.dtype,
    recorded: bool,
) -> None:
    """Write `rows + gamma * expert_ffn(u)` to `out[r, index[r, j]]`, or to `out[r, j]` without an index.

    Args:
        out, index, rows, gamma: as in `op.expert_ffn_scatter`.
        u, mask, weights, quantized, recorded: as in `hidden_rows`.
    """
    hidden = hidden_rows(u, mask, weights, quantized, recorded)
    multiply_scatter(out, index, rows, hidden, weights.fc2_weight, weights.fc2_bias, gamma, recorded)
