"""Convolve with a kernel of 3x3 by oneDNN, on a weight that is packed once.

PyTorch has no public names for these operators; `torch.compile` calls them as they are called here.
"""

from __future__ import annotations

import torch

from actvar_kernels.cpu_backend import brgemm, cpu, memory
from actvar_kernels.cpu_backend.packing import packed

PHASES = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
"""The two weights with which a doubled row makes its even pixels, then the odd ones, from three weights of a kernel."""


def faster(dtype: torch.dtype) -> bool:
    """Return whether oneDNN convolves in `dtype` in less time than the C++ kernel on this processor.

    It does in bfloat16 with AMX, and in float16 with AMX-FP16. Elsewhere the fewer products of Winograd's algorithm
    take less time, or as long in narrow layers. `python -m pytest benchmarks -k conv3x3` times both.
    """
    return cpu.has_tiles() if dtype == torch.bfloat16 else dtype == torch.float16 and brgemm.has_tiles(dtype)


def conv3x3(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None, enlarge: bool
) -> torch.Tensor:
    """Return what `cpu_kernel.conv3x3` does, with the bias rounded to x's dtype.

    Args:
        x: `[B, C, H, W]`, one of `cpu.DTYPES`.
        weight: `[D, C, 3, 3]`, floating-point; another dtype than x's is converted when the weight is packed.
        bias: `[D]`, floating-point.
        residual: in the shape of the result and x's dtype; None: nothing is added.
        enlarge: whether x is convolved in twice its size.

    Returns:
        `[B, D, H, W]` in x's dtype and the memory format `channels_last`; enlarged `[B, D, 2 * H, 2 * W]`.
    """
    x, bias = x.contiguous(memory_format=torch.channels_last), bias.detach().to(x.dtype)
    if enlarge:
        out = _enlarged(x, weight, bias)
        return out if residual is None else residual.contiguous(memory_format=torch.channels_last) + out

    def pack() -> torch.Tensor:
        """Return the weight as oneDNN reads it."""
        return _reordered(weight.detach().to(x.dtype), x)

    return _convolution(x, packed((weight,), ("oneDNN", x.dtype), pack), bias, residual)


def _enlarged(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the convolution of x in twice its size, from one by 2x2 that makes four pixels at once.

    Args:
        x: `[B, C, H, W]` in the memory format `channels_last`.
        weight: `[D, C, 3, 3]`, floating-point.
        bias: `[D]` in x's dtype.
    """
    (B, _, H, W), D = x.shape, weight.shape[0]

    def pack() -> torch.Tensor:
        """Return the weights `[4 * D, C, 2, 2]` of all four pixels as oneDNN reads them."""
        phases = torch.tensor(PHASES, dtype=torch.float64, device="cpu")
        by_phase = torch.einsum("aik,bjl,dckl->abdcij", phases, phases, weight.detach().double())
        return _reordered(by_phase.flatten(0, 2).to(x.dtype), x)

    copy = packed((weight,), ("oneDNN enlarged", x.dtype), pack)
    # With the padding there is one row and column more, since even pixels reach back and odd ones ahead.
    phases = _convolution(x, copy, bias.repeat(4)).permute(0, 2, 3, 1).unflatten(3, (2, 2, D))
    out = memory.empty((B, H, 2, W, 2, D), x.dtype)
    for a in (0, 1):
        for b in (0, 1):
            out[:, :, a, :, b] = phases[:, a : a + H, b : b + W, a, b]
    return out.view(B, 2 * H, 2 * W, D).permute(0, 3, 1, 2)


def _reordered(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a weight `[D, C, k, k]` in oneDNN's own layout, for images of the size of `x` `[B, C, H, W]`."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [1, *x.shape[1:]])


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the convolution of x with padding 1 and a weight that `_reordered` made, plus the residual."""
    how = [1, 1], [1, 1], [1, 1], 1  # padding, stride, dilation and groups
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, "none", [], "")
    residual = residual.contiguous(memory_format=torch.channels_last)
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    return binary(x, residual, weight, bias, *how, "add", None, None, [], None)
