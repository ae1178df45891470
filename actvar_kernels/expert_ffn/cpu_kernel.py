"""Run the expert FFN in C++, on weights that are packed once per layer."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from actvar_kernels.cpu_backend import cpu
from actvar_kernels.cpu_backend.packing import packed


class Packed(NamedTuple):
    """Name the weights of one FFN as `cpu_expert_ffn.cpp` reads them; the biases are float32."""

    weight1: torch.Tensor
    bias1: torch.Tensor
    weight2: torch.Tensor
    bias2: torch.Tensor


def expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    isa: int | None = None,
) -> torch.Tensor:
    """Return what `reference.expert_ffn` does, with sums in float32.

    Args:
        u: `[..., C]`, one of `cpu.DTYPES`, C even.
        mask: `[..., N]` bool.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`, floating-point; another dtype than
            u's is converted when the weights are packed.
        isa: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    isa = cpu.best_isa() if isa is None else isa
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    C, experts = u.shape[-1], mask.shape[-1]
    copies = packed(weights, (experts, u.dtype, isa), lambda: pack(*weights, experts, u.dtype, isa))
    u, mask = u.contiguous(), mask.contiguous()
    out = torch.empty_like(u)
    sizes = cpu.checked_sizes(u.numel() // C, C, experts, fc1_weight.shape[0] // experts)
    pointers = [tensor.data_ptr() for tensor in (u, mask, *copies, out)]
    if _library().expert_ffn(isa, cpu.kind_of(u.dtype), *pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"expert_ffn: no memory for {sizes[0]} tokens of width {C}")
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    library.expert_ffn.argtypes = 2 * [ctypes.c_int] + 7 * [ctypes.c_void_p] + 5 * [ctypes.c_int]
    return library


@torch.no_grad()
def pack(
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    experts: int,
    dtype: torch.dtype,
    isa: int,
) -> Packed:
    """Return the weights in panels, for each expert its input rows by its output columns.

    Args:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`, floating-point.
        experts: number N of experts, which divides D.
        dtype: one of `cpu.DTYPES`, in which the weights are packed.
        isa: instruction set.
    """
    up = fc1_weight.to(dtype).unflatten(0, (experts, -1)).transpose(1, 2)  # [N, C, width]
    down = fc2_weight.to(dtype).unflatten(1, (experts, -1)).permute(1, 2, 0)  # [N, width, C]
    bias1, layout = fc1_bias.float().view(experts, -1), cpu.layout_of(isa, dtype)
    return Packed(
        cpu.panels(up, layout),
        cpu.padded(bias1, layout.lanes),
        cpu.panels(down, layout),
        cpu.padded(fc2_bias.float(), layout.lanes),
    )
