"""The convolution of the decoder."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels import cpu
from actvar_kernels.backend import needs_operator
from actvar_kernels.conv3x3 import cpu_kernel


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` of a 3x3 kernel.

    Where kernels run in C++ and C is a multiple of 16, so does this, in float32 or bfloat16: by Winograd's algorithm,
    which takes 2.25 times fewer multiplications and rounds otherwise. It keeps a transformed copy of the weight.
    Elsewhere it is PyTorch's; on CUDA there the bias is a pass over the output of its own.

    Args:
        x: `[B, C, H, W]`, fastest in the memory format `channels_last`.
        weight: `[D, C, 3, 3]`, a tensor that stays; with `bias` `[D]` in x's dtype, or in any under autocast.
        bias: None: none is added.

    Returns:
        `[B, D, H, W]`.
    """
    if not cpu.runs(x) or needs_operator(x, weight, bias) or x.shape[1] % 16 or bias is None:
        if x.is_cuda and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
            # one copy, where autocast and cuDNN would make one each
            weight = weight.to(cpu.computed_dtype(x), memory_format=torch.channels_last)
            return whole_vectors(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=1)
    return cpu_kernel.conv3x3(x.to(cpu.computed_dtype(x)), weight, bias)


def whole_vectors(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` with the outputs filled up to a multiple of eight and cut off again: with
    three, the channels of an image, cuDNN takes a kernel without tensor cores."""
    D = weight.shape[0]
    missing = -D % 8
    if missing:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else F.pad(bias, (0, missing))
    return F.conv2d(x, weight, bias, padding=1)[:, :D]
