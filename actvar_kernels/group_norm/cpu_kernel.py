"""Run GroupNorm and SiLU in C++, in two passes over memory instead of PyTorch's four."""

from __future__ import annotations

import ctypes
import functools

import torch

from actvar_kernels.cpu_backend import cpu, memory


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    overwrite: bool,
    *,
    isa: int | None = None,
) -> torch.Tensor:
    """Return what `group_norm.op.group_norm_silu` does without an offset, in the memory format `channels_last`.

    Args:
        x: `[B, C, H, W]`, one of `cpu.DTYPES`, C a multiple of 16.
        weight, bias: `[C]`, floating-point.
        groups: number of groups.
        eps: what is added to the variance.
        silu: whether SiLU follows.
        overwrite: whether the result takes the place of x, if that is in `channels_last`.
        isa: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the sums.
    """
    isa = cpu.best_isa() if isa is None else isa
    B, C, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = weight.detach().float().contiguous(), bias.detach().float().contiguous()
    out = x if overwrite else memory.empty((B, H, W, C), x.dtype).permute(0, 3, 1, 2)
    sizes = cpu.checked_sizes(B, H * W, C, groups)
    pointers = x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()
    kind = isa, cpu.kind_of(x.dtype)
    if _library().group_norm_silu(*kind, *pointers, *sizes, silu, eps, torch.get_num_threads()):
        raise MemoryError(f"group_norm_silu: no memory for the sums of {B} images")
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    pointers, sizes = 4 * [ctypes.c_void_p], 5 * [ctypes.c_int]
    library.group_norm_silu.argtypes = 2 * [ctypes.c_int] + pointers + sizes + [ctypes.c_float, ctypes.c_int]
    return library
