"""What a virtual GPU notes down of every launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


class TensorInfo(NamedTuple):
    """Shape, strides and dtype of a kernel's tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Of the elements that are in memory: an expanded dimension counts once."""
        sizes = (size if stride else 1 for size, stride in zip(self.shape, self.strides, strict=True))
        return math.prod(sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class CompiledKernel:
    """A Triton kernel as compiled for one set of arguments.

    Args:
        arch: compute capability.
        shared: bytes of shared memory that a launch asks for.
        cubin: the machine code.
        ttir: Triton's first intermediate code, in which matrix products are still `tt.dot`.
        constants: `tl.constexpr` arguments by name.
    """

    name: str
    arch: int
    num_warps: int
    num_stages: int
    shared: int
    cubin: bytes
    ttir: str
    constants: dict[str, object]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Args:
        name: of the Triton kernel, or of the ATen operation (`"aten.mm"`).
        region: what `VirtualGPU.region` was at the time.
        bytes, flops: estimate of memory traffic and matrix-product work; for Triton kernels what is in
            `actvar_kernels.tools.virtual.cost` at full work.
        launches: GPU kernels behind the call; more than 1 for some ATen operations.
        dtype: of the matrix products' operands, or None without any.
        kernel, grid, arguments: of Triton launches: arguments by name, tensors as `TensorInfo`.
        result: of torch's operations, the first tensor they return.
    """

    name: str
    region: str
    bytes: int
    flops: int
    dtype: torch.dtype | None
    launches: int = 1
    kernel: CompiledKernel | None = None
    grid: tuple[int, int, int] | None = None
    arguments: dict[str, object] | None = None
    result: TensorInfo | None = None
