"""Convolve as the decoder does."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import choose, choose_fused
from actvar_kernels.checks import expect_shape
from actvar_kernels.conv3x3 import cpu_kernel, gpu
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.situation import TORCH, situation


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    enlarge: bool = False,
) -> torch.Tensor:
    """Return `F.conv2d(x, weight, bias, padding=1) + residual` for a kernel of 3x3.

    C++ takes channels in multiples of 16, in float32, bfloat16 or float16. Its algorithm is Winograd's, which takes
    2.25 times fewer multiplications, or 4 times fewer for large maps except in bfloat16, and rounds in another way. C++
    keeps a transformed copy of the weight. Where it would run in 16 bits on a processor with tiles of them (AMX),
    oneDNN convolves on a packed copy instead. Otherwise the convolution is PyTorch's. On CUDA a bias is a pass of its
    own over the output, weights are converted once, and an enlarged image takes 2.25 times fewer products.

    Args:
        x: `[B, C, H, W]`, floating-point; fastest in the memory format `channels_last`.
        weight: `[D, C, 3, 3]` in x's dtype, or in any under autocast. The copy stays as long as this tensor. A change
            of its version, address or dtype is seen; after other changes call `actvar.refresh` on its module.
        bias: `[D]`, like the weight; None: nothing is added.
        residual: in the shape of the result, floating-point; None: nothing is added.
        enlarge: whether x is convolved in twice its size, `F.interpolate(x, scale_factor=2, mode="nearest")`.

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
    if _runs_in_cpp(x, weight, bias, residual) and bias is not None:  # C++ takes no call without a bias
        x = x.to(cpu.computed_dtype(x))
        if residual is None or residual.dtype == x.dtype:
            return cpu_kernel.conv3x3(x, weight, bias, residual, enlarge)
        return residual + cpu_kernel.conv3x3(x, weight, bias, enlarge=enlarge)
    if gpu.takes(x):
        out = gpu.conv3x3(x, weight, bias, enlarge)
    else:
        x = F.interpolate(x, scale_factor=2, mode="nearest") if enlarge else x
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

    backend = choose(
        "conv3x3",
        x,
        weight,
        bias,
        residual,
        why_not_in_cpp=why_not_in_cpp,
        library_on_triton=True,
        has_operator=False,
    )
    return backend.name == "cpu"


def in_fast_format(x: torch.Tensor) -> torch.Tensor:
    """Return images in the memory format in which convolutions that follow take the least time.

    Convolutions of oneDNN and cuDNN are faster in `channels_last`. Transforms of PyTorch do not take this format
    everywhere.

    Args:
        x: `[B, C, H, W]`, floating-point.
    """
    if choose_fused(x).fuses_residual and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    if x.is_cpu and situation(x) != TORCH:
        return x.contiguous(memory_format=torch.channels_last)
    return x
