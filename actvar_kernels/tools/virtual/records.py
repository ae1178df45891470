"""Describe what a virtual GPU notes down of every launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch


class TensorInfo(NamedTuple):
    """Describe a kernel's tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        """Return the description of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Return the bytes of the elements that are in memory: an expanded dimension counts once."""
        sizes = (size if stride else 1 for size, stride in zip(self.shape, self.strides, strict=True))
        return math.prod(sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class CompiledKernel:
    """Describe a Triton kernel as compiled for one set of arguments.

    Attributes:
        name: of the kernel.
        arch: compute capability, or AMD's name of an architecture.
        num_warps, num_stages: warps and pipeline stages.
        shared: bytes of shared memory that a launch asks for.
        binary: the machine code.
        assembly: its text for a GPU of AMD, otherwise None.
        ttir: Triton's first intermediate code, in which matrix products are still `tt.dot`.
        constants: `tl.constexpr` arguments by name.
        early: whether it is launched before the kernel ahead of it has ended, see `triton_backend/early_launch.py`.
    """

    name: str
    arch: int | str
    num_warps: int
    num_stages: int
    shared: int
    binary: bytes
    assembly: str | None
    ttir: str
    constants: dict[str, object]
    early: bool = False


@dataclass(frozen=True)
class Launch:
    """Describe one kernel launch.

    Attributes:
        name: of the Triton kernel, or of the ATen operation (`"aten.mm"`).
        region: what `VirtualGPU.region` was at the time.
        bytes, flops: estimate of memory traffic and matrix-product work; for Triton kernels what is in
            `actvar_kernels.tools.virtual.cost` at full work.
        dtype: of the matrix products' operands, or None without any.
        launches: GPU kernels behind the call; more than 1 for some ATen operations.
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
