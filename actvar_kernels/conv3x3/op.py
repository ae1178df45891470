"""The convolution of the decoder."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import TORCH, choose, choose_fused, situation
from actvar_kernels.checks import expect_shape
from actvar_kernels.conv3x3 import cpu_kernel
from actvar_kernels.cpu_backend import cpu


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    enlarge: bool = False,
) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=1) + residual` of a 3x3 kernel.

    Where kernels run in C++ and C is a multiple of 16, so does this, in float32 or bfloat16: by Winograd's algorithm,
    which takes 2.25 times fewer multiplications, or 4 times where maps are large in float32, and rounds otherwise. It
    keeps a transformed copy of the weight. Elsewhere it is PyTorch's; on CUDA there the bias is a pass over the output
    of its own.

    Args:
        x: `[B, C, H, W]`, fastest in the memory format `channels_last`.
        weight: `[D, C, 3, 3]`, a tensor that stays; with `bias` `[D]` in x's dtype, or in any under autocast. A change
            of its version, address or dtype is seen; after others call `actvar.refresh` on its module.
        bias: None: none is added.
        residual: of the result's shape; None: nothing is added.
        enlarge: of `F.interpolate(x, scale_factor=2, mode="nearest")` in place of x.

    Returns:
        `[B, D, H, W]`; enlarged `[B, D, 2 * H, 2 * W]`.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None, None))
    B, C, H, W = x.shape
    expect_shape("weight", weight, (None, C, 3, 3))
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],))
    if residual is not None:
        expect_shape("residual", residual, (B, weight.shape[0], *((2 * H, 2 * W) if enlarge else (H, W))))
    if _runs_in_cpp(x, weight, bias, residual):
        x = x.to(cpu.computed_dtype(x))
        if residual is None or residual.dtype == x.dtype:
            return cpu_kernel.conv3x3(x, weight, bias, residual, enlarge)
        return residual + cpu_kernel.conv3x3(x, weight, bias, enlarge=enlarge)
    if enlarge:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if x.is_cuda and not torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
        # one copy, where autocast and cuDNN would make one each
        weight = weight.to(cpu.computed_dtype(x), memory_format=torch.channels_last)
        out = filled_up(x, weight, bias)
    else:
        out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else residual + out


def _runs_in_cpp(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> bool:
    """Return whether the C++ kernel runs; on the Triton backend the convolution is PyTorch's.

    Raises:
        BackendUnavailableError: `"cpu"` was asked for by name and does not take the call.
    """

    def why_not_in_cpp() -> str | None:
        if bias is None or x.shape[1] % 16:
            return f"it takes a bias and channels in multiples of 16, got {x.shape[1]} channels"
        return cpu.why_not(dtype=cpu.computed_dtype(x))

    tensors = (x, weight, bias, residual)
    options = dict(why_not_in_cpp=why_not_in_cpp, library_on_triton=True, has_operator=False)
    return choose("conv3x3", *tensors, **options).name == "cpu"


def in_fast_format(x: torch.Tensor) -> torch.Tensor:
    """Return images `x` `[B, C, H, W]` in the memory format in which convolutions that follow take the least time.

    oneDNN's and cuDNN's are faster in `channels_last`. Transforms of PyTorch do not take all of it.
    """
    if choose_fused(x).fuses_residual and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    if x.is_cpu and situation(x) != TORCH:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def filled_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.conv2d(x, weight, bias, padding=1)` with few outputs filled up and cut off again. With three, the channels of
    an image, cuDNN takes a kernel without tensor cores; in 16 bits it still does with eight (26 ms for 64 images of 256
    pixels on an H100), while 64 are a tile of the kernel that other layers run on."""
    D = weight.shape[0]
    missing = -D % (64 if weight.itemsize == 2 and D < 64 else 8)
    if missing:
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else F.pad(bias, (0, missing))
    return F.conv2d(x, weight, bias, padding=1)[:, :D]
