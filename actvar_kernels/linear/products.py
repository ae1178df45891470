"""Multiply matrices by the libraries of PyTorch, for operations and kernels that share this."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `gelu_tanh(x @ weight.T + bias)` `[T, D]` without gradients, by PyTorch.

    On CUDA GELU runs in the epilogue of the product, except in float32, where that of cuBLAS is less exact.

    Args:
        x: `[T, C]`, floating-point.
        weight, bias: `[D, C]` and `[D]`, in x's dtype.
    """
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        # PyTorch has no public name for it
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)  # pyright: ignore[reportPrivateImportUsage]
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
