"""Define linear layers in eight bits in plain PyTorch: symmetric, with a scale per row and per output column."""

from __future__ import annotations

import torch

MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""Most products that a sum of 32 bits holds, of a byte that C++ makes 128 too high with a signed one."""


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `round(x / scale)` in int8, half to even, and `scale = max |x| / 127` of each row in float32.

    Rows of zeros have the scale 0. Rows with infinity or NaN become zeros with a scale that is not finite.

    Args:
        x: `[..., C]`, floating-point.

    Returns:
        `[..., C]` int8 and `[..., 1]` float32.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    divides = (scale > 0) & (scale < torch.inf)
    rounded = (x / torch.where(divides, scale, 1)).clamp(-127, 127).round()
    return torch.where(divides, rounded, 0).to(torch.int8), scale


@torch.no_grad()
def quantized_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantized` returns for `weight` `[D, C]`, in parts whose copies in float32 stay small."""
    found = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight), 1, dtype=torch.float32)
    rows = max(1, 2**18 // weight.shape[1])
    for part, *results in zip(weight.split(rows), *(result.split(rows) for result in found), strict=True):
        for result, numbers in zip(results, quantized(part), strict=True):
            result.copy_(numbers)
    return found


def quantized_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.T + bias` with both factors in eight bits.

    The sums of the products are exact integers. A sum times the scale of the column, times that of the row, plus the
    bias is rounded to float32 after each step. LLM.int8() (Dettmers et al., 2022) calls this vector-wise quantization.

    Args:
        x: `[..., C]`, floating-point.
        weight, bias: `[D, C]` and `[D]`, floating-point.

    Returns:
        `[..., D]` in x's dtype.
    """
    return quantized_product(x, weight, bias).to(x.dtype)


def quantized_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the result of `quantized_linear` in float32, `[..., D]`; see there."""
    (rows, row_scales), (columns, column_scales) = quantized(x), quantized(weight)
    sums = rows.double() @ columns.double().t()  # exact up to 2^53
    return sums.float() * column_scales.flatten() * row_scales + bias.float()
