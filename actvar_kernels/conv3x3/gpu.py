"""Convolve on a GPU with copies of weights that are made once: by PyTorch's library, or as a measured table says."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from actvar_kernels.backend import KERNEL_DTYPES, get_backend, triton_installed
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.situation import DIRECT, TORCH, situation

if TYPE_CHECKING:
    from actvar_kernels.triton_backend.conv_tiles import ConvTiles

ENLARGING = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))
"""The four weights of a transposed convolution that makes two pixels of each, from three weights of a kernel."""
FEWEST_OUTPUTS = 64
"""Outputs of the smallest tile of cuDNN's kernels with tensor cores in 16 bits; elsewhere 8 are enough."""


def takes(x: torch.Tensor) -> bool:
    """Return whether the functions of this file take an image `x` `[B, C, H, W]`.

    They take images on a GPU in the memory format `channels_last`, without gradients, outside of a compiler.
    """
    fits = x.is_cuda and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last)
    return fits and not torch.compiler.is_compiling() and situation(x) != TORCH


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, enlarge: bool) -> torch.Tensor:
    """Return `F.conv2d(x, weight, bias, padding=1)`, or that of x in twice its size.

    Nearest neighbours and a kernel of 3x3 are a transposed convolution of stride 2 by a kernel of 4x4, whose weights
    are sums of the kernel's. It takes 4 products where the enlarged image takes 9, and no copy of it.

    With few outputs, such as the channels of an image, cuDNN takes a kernel without tensor cores. In 16 bits it does so
    with eight as well, which took 26 ms for 64 images of 256 pixels on an H100. So they are filled up and cut off.

    Args:
        x: `[B, C, H, W]`, one that `takes` accepts.
        weight: `[D, C, 3, 3]`, floating-point.
        bias: `[D]`, floating-point, or None.
        enlarge: whether x is doubled in height and width first.
    """
    tiles = None if enlarge else measured_tiles(x, weight, fused=False)
    if tiles is not None:
        from actvar_kernels.conv3x3 import triton_kernel

        return triton_kernel.conv3x3(x, weight, bias, None, measured=False, tiles=tiles)[0]
    dtype, D = cpu.computed_dtype(x), weight.shape[0]
    bias = None if bias is None else kept(bias, dtype)
    if enlarge:
        layout = "enlarging", dtype
        return F.conv_transpose2d(x, packed((weight,), layout, lambda: enlarging(weight, dtype)), bias, 2, 1)
    missing = -D % (FEWEST_OUTPUTS if dtype.itemsize == 2 and D < FEWEST_OUTPUTS else 8)
    if not missing:
        return F.conv2d(x, kept(weight, dtype), bias, padding=1)

    def filled_up() -> torch.Tensor:
        """Return the weight with outputs of zeros behind its own."""
        return _fastest(F.pad(weight.detach().to(dtype), (0, 0, 0, 0, 0, 0, 0, missing)))

    if bias is not None:
        bias = packed((bias,), ("filled up", missing), functools.partial(F.pad, bias, (0, missing)))
    return F.conv2d(x, packed((weight,), ("filled up", dtype), filled_up), bias, padding=1)[:, :D]


class Measured(NamedTuple):
    """Hold images and what a norm needs to know of them.

    Attributes:
        x: `[B, D, H, W]`.
        moments: `[B, 2, parts, D]` float32, as `group_norm_silu` takes them.
        part: positions of a part.
    """

    x: torch.Tensor
    moments: torch.Tensor
    part: int


def conv3x3_measured(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> Measured | None:
    """Return `F.conv2d(x, weight, bias, padding=1) + residual` and its moments, from one launch.

    The result is None where no measured table says that this is the fastest way.

    Args:
        x: `[B, C, H, W]`, floating-point.
        weight: `[D, C, 3, 3]`, floating-point.
        bias: `[D]`, floating-point.
        residual: `[B, D, H, W]`, floating-point.
    """
    tiles = measured_tiles(x, weight, fused=True)
    if tiles is None or residual.dtype != x.dtype or not takes(residual):
        return None
    from actvar_kernels.conv3x3 import triton_kernel

    out, moments = triton_kernel.conv3x3(x, weight, bias, residual, measured=True, tiles=tiles)
    assert moments is not None
    return Measured(out, moments, tiles.pixels)


def measured_tiles(x: torch.Tensor, weight: torch.Tensor, fused: bool) -> ConvTiles | None:
    """Return the tiles of this package's kernel where the table of `ACTVAR_TUNED` has it faster, otherwise None.

    Args:
        x: `[B, C, H, W]`, floating-point.
        weight: `[D, C, 3, 3]`, floating-point.
        fused: whether a residual is added and measured.
    """
    if not os.environ.get(ENVIRONMENT_VARIABLE) or get_backend() == "reference" or not triton_installed():
        return None
    computes_as_stored = cpu.computed_dtype(x) == x.dtype and x.dtype in KERNEL_DTYPES
    if not computes_as_stored or not takes(x) or situation(x, weight) != DIRECT:
        return None
    from actvar_kernels.triton_backend.tuned_choices import tuned_conv3x3

    return tuned_conv3x3(x, weight.shape[0], fused)


def conv1x1(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `F.conv2d(x, weight, bias)` of an image that `takes` accepts, or any other by the weight as it is.

    Args:
        x: `[B, C, H, W]`, floating-point.
        weight: `[D, C, 1, 1]`, floating-point.
        bias: `[D]`, floating-point, or None.
    """
    if not takes(x):
        return F.conv2d(x, weight, bias)
    dtype = cpu.computed_dtype(x)
    return F.conv2d(x, kept(weight, dtype), None if bias is None else kept(bias, dtype))


def kept(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight or bias in `dtype`, and a kernel in the memory format `channels_last`, converted once.

    The copy stays as long as the weight. A change of the weight's version, address or dtype is seen.
    """
    ready = weight.dim() < 4 or weight.is_contiguous(memory_format=torch.channels_last)
    if weight.dtype == dtype and ready:
        return weight
    return packed((weight,), ("as it is", dtype), lambda: _fastest(weight.detach().to(dtype)))


def enlarging(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the kernel `[C, D, 4, 4]` of a transposed convolution of stride 2 and padding 1 from `[D, C, 3, 3]`.

    The sums are taken in float64 and rounded once.
    """
    rows = torch.tensor(ENLARGING, dtype=torch.float64, device=weight.device)
    return _fastest(torch.einsum("ik,jl,dckl->cdij", rows, rows, weight.detach().double()).to(dtype))


def _fastest(weight: torch.Tensor) -> torch.Tensor:
    """Return a kernel in the memory format in which cuDNN reads it, and a bias as it is."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
