"""Run a linear layer in C++, on a weight that is packed once."""

from __future__ import annotations

import ctypes
import functools

import torch

from actvar_kernels.cpu_backend import cpu
from actvar_kernels.cpu_backend.packing import packed

FEW_ROWS = 8
"""Most rows for a weight that is not packed; `FEW_ROWS` in cpu_linear.cpp."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, isa: int | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` with sums in float32.

    Args:
        x: `[..., C]`, one of `cpu.DTYPES`.
        weight: `[D, C]`, floating-point; another dtype than x's is converted when the weight is packed.
        bias: `[D]`, floating-point.
        isa: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for a copy of a few rows.
    """
    isa = cpu.best_isa() if isa is None else isa
    dtype, D = x.dtype, weight.shape[0]
    layout = cpu.layout_of(isa, dtype)

    def pack() -> torch.Tensor:
        """Return the weight in panels, flat."""
        return cpu.panels(weight.detach().to(dtype).t().unsqueeze(0), layout).flatten()

    copy = packed((weight,), (dtype, isa), pack)
    x = cpu.padded(x, layout.step)
    bias = cpu.padded(bias if bias.dtype == torch.float32 else bias.detach().float(), layout.lanes)
    *rows, C = x.shape
    out = x.new_empty(*rows, D)
    sizes = cpu.checked_sizes(x.numel() // C, C, D)
    pointers = x.data_ptr(), copy.data_ptr(), bias.data_ptr(), out.data_ptr()
    if _library().linear(isa, cpu.kind_of(dtype), *pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"linear: no memory for {sizes[0]} rows of width {C}")
    return out


def unpacked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, isa: int | None = None) -> torch.Tensor:
    """Return `x @ weight.T + bias` with sums in float32, each weight read once.

    Args:
        x: `[R, C]`, one of `cpu.DTYPES`, at most `FEW_ROWS` rows, C a multiple of 32.
        weight: `[D, C]` without gaps, in x's dtype.
        bias: `[D]`, floating-point.
        isa: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
    """
    isa = cpu.best_isa() if isa is None else isa
    (R, C), D = x.shape, weight.shape[0]
    x, bias, out = x.contiguous(), bias.detach().float().contiguous(), x.new_empty(R, D)
    sizes = cpu.checked_sizes(R, C, D)
    pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    _library().unpacked_linear(isa, cpu.kind_of(x.dtype), *pointers, *sizes, torch.get_num_threads())
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    for function in (library.linear, library.unpacked_linear):
        function.argtypes = 2 * [ctypes.c_int] + 4 * [ctypes.c_void_p] + 4 * [ctypes.c_int]
    library.unpacked_linear.restype = None
    return library
