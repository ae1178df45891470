"""Change a matrix by a product of two thin ones (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Hold the factors of a change `B A` of rank r or less.

    Args:
        A: `[r, inputs]` in a floating dtype.
        B: `[outputs, r]` in a floating dtype.
    """

    A: Tensor
    B: Tensor


def merged(weight: Tensor, factors: Factors) -> Tensor:
    """Return `W + B A` in the dtype of `weight` `[outputs, inputs]`, with gradients where these are wanted.

    The sum is computed in float32, or in float64 for such a weight, also under autocast, and rounded once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        A, B = (factor.to(weight.device, dtype) for factor in factors)
        return torch.addmm(weight.to(dtype), B, A).to(weight.dtype)
