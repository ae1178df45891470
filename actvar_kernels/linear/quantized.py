"""Define linear layers in eight bits in plain PyTorch: symmetric, with a scale per row and per output column."""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""The number that the largest of a row becomes."""
MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""Most products that a sum of 32 bits holds, of a byte that C++ makes 128 too high with a signed one."""


def quantize(x: torch.Tensor, quantized: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `round(x / scale)`, half to even, and `scale = max |x| / LARGEST` of each row in float32.

    Rows of zeros have the scale 0. Rows with infinity or NaN become zeros with a scale that is not finite.

    Args:
        x: `[..., C]`, floating-point.
        quantized: one of `constants.FORMATS`.

    Returns:
        `[..., C]` in that dtype and `[..., 1]` float32.
    """
    x, most = x.float(), LARGEST[quantized]
    scale = x.abs().amax(dim=-1, keepdim=True) / most
    divides = (scale > 0) & (scale < torch.inf)
    quotient = torch.where(divides, (x / torch.where(divides, scale, 1)).clamp(-most, most), 0)
    return (quotient if quantized.is_floating_point else quotient.round()).to(quantized), scale


@torch.no_grad()
def quantized_weight(weight: torch.Tensor, quantized: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize` returns for `weight` `[D, C]`, in parts whose copies in float32 stay small."""
    found = weight.new_empty(weight.shape, dtype=quantized), weight.new_empty(len(weight), 1, dtype=torch.float32)
    rows = max(1, 2**18 // weight.shape[1])
    for part, *results in zip(weight.split(rows), *(result.split(rows) for result in found), strict=True):
        for result, numbers in zip(results, quantize(part, quantized), strict=True):
            result.copy_(numbers)
    return found


def quantized_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, quantized: torch.dtype) -> torch.Tensor:
    """Return `x @ weight.T + bias` with both factors in eight bits.

    The sums of the products are exact. A sum is rounded to float32. It times the scale of the column, times that of the
    row, plus the bias is rounded to float32 after each step. LLM.int8() (Dettmers et al., 2022) calls this vector-wise
    quantization. E4M3 is the format of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022).

    Args:
        x: `[..., C]`, floating-point.
        weight, bias: `[D, C]` and `[D]`, floating-point.
        quantized: one of `constants.FORMATS`.

    Returns:
        `[..., D]` in x's dtype.
    """
    return quantized_product(x, weight, bias, quantized).to(x.dtype)


def quantized_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, quantized: torch.dtype
) -> torch.Tensor:
    """Return the result of `quantized_linear` in float32, `[..., D]`; see there."""
    (rows, row_scales), (columns, column_scales) = quantize(x, quantized), quantize(weight, quantized)
    sums = rows.double() @ columns.double().t()  # exact up to 2^53 times the least product
    return sums.float() * column_scales.flatten() * row_scales + bias.float()
