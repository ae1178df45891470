"""A 3x3 convolution in C++, its weight transformed and packed once."""

from __future__ import annotations

import ctypes
import functools

import torch

from actvar_kernels import cpu
from actvar_kernels.packing import packed

# G of Winograd's F(2x2, 3x3): a kernel w becomes G w G^T
_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, level: int | None = None) -> torch.Tensor:
    """As `conv3x3.op.conv3x3`, with sums in float32.

    Args:
        x: `[B, C, H, W]` float32 or bfloat16, C a multiple of 16; a weight of another type is converted when it is
            packed.
        level: instruction set; None: the highest.

    Returns:
        `[B, D, H, W]` in the memory format `channels_last`.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    level = cpu.best_level() if level is None else level
    layout, (B, C, H, W), D = cpu.layout_of(level), x.shape, weight.shape[0]

    def pack() -> torch.Tensor:
        transform = torch.tensor(_TRANSFORM)
        by_position = torch.einsum("ai,dcij,bj->abcd", transform, weight.detach().float(), transform)
        return cpu.panels(by_position.flatten(0, 1).to(x.dtype), layout).flatten()

    copy = packed((weight,), ("winograd", x.dtype, level), pack)
    bias = cpu.padded(bias.detach().float(), layout.lanes)
    x = x.contiguous(memory_format=torch.channels_last)
    out = x.new_empty((B, H, W, D)).permute(0, 3, 1, 2)
    sizes = cpu.checked_sizes(B, H, W, C, D)
    pointers = x.data_ptr(), copy.data_ptr(), bias.data_ptr(), out.data_ptr()
    if _library().conv3x3(level, x.dtype == torch.bfloat16, *pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"conv3x3: no memory for {C} channels")
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    library.conv3x3.argtypes = 2 * [ctypes.c_int] + 4 * [ctypes.c_void_p] + 6 * [ctypes.c_int]
    return library
