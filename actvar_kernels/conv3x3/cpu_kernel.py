"""Convolve on the CPU with a kernel of 3x3, whose weight is packed once: in C++, or by oneDNN where that is faster."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from actvar_kernels.conv3x3 import onednn
from actvar_kernels.cpu_backend import cpu, memory
from actvar_kernels.cpu_backend.packing import packed

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.6875, -0.6875, 1.5, -1.5)}
"""Points at which polynomials are multiplied, by the outputs of a tile; infinity comes last. Those of 4 err little."""
ENLARGING = ((-1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, -0.5), (-0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""Turn three weights into those of the five products of a tile of an enlarged image, see docs/kernels/conv3x3.md."""


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    enlarge: bool = False,
    *,
    engine: str | None = None,
    isa: int | None = None,
    outputs: int | None = None,
) -> torch.Tensor:
    """Return what `conv3x3.op.conv3x3` does, with sums in float32.

    Args:
        x: `[B, C, H, W]`, one of `cpu.DTYPES`, C a multiple of 16.
        weight: `[D, C, 3, 3]`, floating-point; another dtype than x's is converted when the weight is packed.
        bias: `[D]`, floating-point.
        residual: in the shape of the result and x's dtype; None: nothing is added.
        enlarge: whether x is convolved in twice its size.
        engine: `"C++"` or `"oneDNN"`; None: the faster one.
        isa: instruction set of C++; None: the highest.
        outputs: side of a tile in C++ where x is not enlarged: 2, or 4 except in bfloat16; None: chosen by the size.

    Returns:
        `[B, D, H, W]` in x's dtype and the memory format `channels_last`; enlarged `[B, D, 2 * H, 2 * W]`.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    if engine == "oneDNN" or (engine is None and onednn.faster(x.dtype)):
        return onednn.conv3x3(x, weight, bias, residual, enlarge)
    isa = cpu.best_isa() if isa is None else isa
    (B, C, H, W), D, factors = x.shape, weight.shape[0], cpu.factors(isa, x.dtype)
    layout = cpu.layout_of(isa, factors)
    outputs = None if enlarge else outputs or tile_outputs(x.dtype, C, D, H * W)

    def pack() -> torch.Tensor:
        """Return the transformed weight in panels, flat."""
        transform = _weight_transform(outputs)
        by_position = [
            torch.einsum("ai,dcij,bj->abcd", transform, part.double(), transform).flatten(0, 1).to(factors)
            for part in weight.detach().split(64)  # since there are four times as many numbers, of 8 bytes
        ]
        return cpu.panels(torch.cat(by_position, dim=2), layout).flatten()

    copy = packed((weight,), ("winograd", outputs, factors, isa), pack)
    bias = cpu.padded(bias.detach().float(), layout.lanes)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    out = memory.empty((B, 2 * H, 2 * W, D) if enlarge else (B, H, W, D), x.dtype).permute(0, 3, 1, 2)
    sizes = cpu.checked_sizes(B, H, W, C, D)
    pointers = x.data_ptr(), copy.data_ptr(), bias.data_ptr(), None if residual is None else residual.data_ptr()
    kind = isa, cpu.kind_of(x.dtype), (2, 4, None).index(outputs)
    if _library().conv3x3(*kind, *pointers, out.data_ptr(), *sizes, torch.get_num_threads()):
        raise MemoryError(f"conv3x3: no memory for {C} channels")
    return out


def tile_outputs(dtype: torch.dtype, C: int, D: int, pixels: int) -> int:
    """Return the side of a tile, 2 or 4.

    Large tiles take fewer products and more weights, which pays where pixels are many beside channels. In bfloat16,
    which rounds the transformed inputs, large tiles would lose too much precision. Float16 is transformed in float32.

    Args:
        dtype: one of `cpu.DTYPES`.
        C, D: channels of the input and of the output.
        pixels: size of the output's map.
    """
    return 4 if dtype != torch.bfloat16 and pixels >= 4 * max(C, D) else 2


def packed_bytes(dtype: torch.dtype, C: int, D: int, pixels: int, enlarge: bool) -> int:
    """Return the bytes of the packed copy of a kernel of 3x3.

    Args:
        dtype: one of `cpu.DTYPES`.
        C, D: channels of the input and of the output.
        pixels: size of the output's map.
        enlarge: whether the input is convolved in twice its size.
    """
    if onednn.faster(dtype):
        return C * D * (16 if enlarge else 9) * dtype.itemsize
    numbers = 25 if enlarge else (tile_outputs(dtype, C, D, pixels) + 2) ** 2
    return C * D * numbers * cpu.factors(cpu.best_isa(), dtype).itemsize


def _weight_transform(outputs: int | None) -> torch.Tensor:
    """Return the matrix G `[products, 3]` float64 with which a kernel w of 3x3 becomes `G w G^T`.

    Args:
        outputs: side of a tile, a key of `POINTS`; None: the tiles are those of an enlarged image.
    """
    if outputs is None:
        return torch.tensor(ENLARGING, dtype=torch.float64, device="cpu")
    points = POINTS[outputs]
    rows = [[p**k / math.prod(p - q for q in points if q != p) for k in range(3)] for p in points]
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64, device="cpu")


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    library.conv3x3.argtypes = 3 * [ctypes.c_int] + 5 * [ctypes.c_void_p] + 6 * [ctypes.c_int]
    return library
