"""Run a linear layer in C++ by PyTorch's products, in 16 or in eight bits."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.linear.quantized import MOST_INPUTS, quantized_weight


class PackedWeight(NamedTuple):
    """Hold matrices as C++ reads them, with zeros up to full panels.

    Attributes:
        panels: `[N, ...]`, numbers of 16 bits or int8, for each of N matrices its panels of columns.
        scales: float32 scales of the columns of int8, otherwise None.
        offsets: `[N, columns]` int32, 128 times the sums of the columns of int8, since the rows are 128 too high.
    """

    panels: torch.Tensor
    scales: torch.Tensor | None
    offsets: torch.Tensor | None

    def pointers(self) -> tuple[int | None, ...]:
        """Return the addresses of all three."""
        return tuple(None if part is None else part.data_ptr() for part in self)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, int8: bool, isa: int | None = None
) -> torch.Tensor:
    """Return `x @ weight.T + bias` with sums in float32, or what `quantized.quantized_linear` does, bit for bit.

    Args:
        x: `[..., C]`, bfloat16 or float16; in eight bits float32 as well.
        weight: `[D, C]`, floating-point; converted when it is packed.
        bias: `[D]`, floating-point.
        int8: whether the products are of bytes.
        isa: instruction set of all but the products; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count, or sums that 32 bits do not hold.
        MemoryError: there is none left for the quantized rows.
    """
    isa = cpu.best_isa() if isa is None else isa

    def pack_weight() -> PackedWeight:
        """Return the weight in panels."""
        matrix, scales = quantized_weight(weight, torch.int8) if int8 else (weight.detach().to(x.dtype), None)
        return pack(matrix.t().unsqueeze(0), None if scales is None else scales.flatten())

    copy = packed((weight,), ("brgemm", torch.int8 if int8 else x.dtype), pack_weight)
    layout = brgemm.LAYOUTS[copy.panels.dtype]
    x = x.contiguous() if int8 else cpu.padded(x, layout.step)
    bias = cpu.padded(bias.detach().float(), layout.lanes)
    *rows, C = x.shape
    out = x.new_empty(*rows, weight.shape[0])
    sizes = cpu.checked_sizes(x.numel() // C, C, weight.shape[0])
    pointers = (*copy.pointers(), bias.data_ptr(), out.data_ptr())
    kind = isa, cpu.kind_of(x.dtype), int8
    if _library().brgemm_linear(*kind, x.data_ptr(), *pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"linear: no memory for {sizes[0]} rows of width {C}")
    return out


def pack(matrices: torch.Tensor, scales: torch.Tensor | None) -> PackedWeight:
    """Return matrices in panels.

    Args:
        matrices: `[N, K, columns]`, numbers of 16 bits or int8.
        scales: float32 scales of the columns of int8, `[columns]` or `[N, columns]`; otherwise None.

    Raises:
        ValueError: so many rows of int8 that a sum could exceed 32 bits.
    """
    if scales is not None and matrices.shape[1] > MOST_INPUTS:
        raise ValueError(f"weight: expected at most {MOST_INPUTS} inputs in eight bits, got {matrices.shape[1]}")
    layout = brgemm.LAYOUTS[matrices.dtype]
    panels = cpu.panels(matrices, layout)
    if scales is None:
        return PackedWeight(panels, None, None)
    offsets = 128 * column_sums(matrices)
    return PackedWeight(panels, cpu.padded(scales, layout.lanes), cpu.padded(offsets, layout.lanes))


def column_sums(matrices: torch.Tensor) -> torch.Tensor:
    """Return int32 sums `[N, columns]` of int8 `[N, K, columns]`; PyTorch widens what it sums, so in parts."""
    columns = max(1, 2**18 // (matrices.shape[0] * matrices.shape[1]))
    return torch.cat([part.sum(1, dtype=torch.int32) for part in matrices.split(columns, dim=2)], dim=1)


@functools.cache
def _library() -> ctypes.CDLL:
    library = brgemm.library()
    library.brgemm_linear.argtypes = 3 * [ctypes.c_int] + 6 * [ctypes.c_void_p] + 4 * [ctypes.c_int]
    return library
