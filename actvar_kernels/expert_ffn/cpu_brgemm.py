"""Run the expert FFN in C++ by PyTorch's products, in 16 or in eight bits."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.cpu_backend.packing import packed
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.linear.cpu_brgemm import PackedWeight, column_sums, pack
from actvar_kernels.linear.quantized import quantized_weight

WIDTH = brgemm.LAYOUTS[torch.int8].lanes
MOST_FILLED = 0.1
"""Most zeros for a hidden unit that fill experts up to full panels. Beyond it experts are not skipped."""


def expert_ffn(
    u: torch.Tensor, mask: torch.Tensor, weights: FFNWeights, int8: bool, skips: bool = True, isa: int | None = None
) -> torch.Tensor:
    """Return what `reference.expert_ffn` does, with sums in float32, or in eight bits.

    Args:
        u: `[..., C]`, bfloat16 or float16, C even; in eight bits float32 as well, any C.
        mask: `[..., N]` bool.
        weights: of the FFN, floating-point; converted when they are packed.
        int8: whether the products are of bytes.
        skips: whether experts that a token did not choose are left out, instead of being computed and set to zero.
        isa: instruction set of all but the products; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    isa = cpu.best_isa() if isa is None else isa
    C, experts = u.shape[-1], mask.shape[-1]
    width = weights.fc1_weight.shape[0] // experts
    groups = experts if -width % WIDTH <= MOST_FILLED * width else 1
    dtype = torch.int8 if int8 else u.dtype
    up, bias1, down, bias2 = packed(weights, ("brgemm", groups, dtype), lambda: _packed(weights, groups, dtype))
    u, mask = u.contiguous(), mask.contiguous()
    out = torch.empty_like(u)
    sizes = cpu.checked_sizes(u.numel() // C, C, experts, width, groups)
    pointers = (
        *(u.data_ptr(), mask.data_ptr()),
        *(*up.pointers(), bias1.data_ptr()),
        *(*down.pointers(), bias2.data_ptr(), out.data_ptr()),
    )
    switches = cpu.kind_of(u.dtype), int8, skips and groups > 1
    if _library().brgemm_expert_ffn(isa, *switches, *pointers, *sizes, torch.get_num_threads()):
        raise MemoryError(f"expert_ffn: no memory for {sizes[0]} tokens of width {C}")
    return out


class Packed(NamedTuple):
    """Hold the weights of one FFN as C++ reads them, and the biases in float32."""

    up: PackedWeight
    bias1: torch.Tensor
    down: PackedWeight
    bias2: torch.Tensor


@torch.no_grad()
def _packed(weights: FFNWeights, groups: int, dtype: torch.dtype) -> Packed:
    """Return the weights as C++ reads them. Hidden units are filled up with zeros to full panels in each group."""
    if dtype == torch.int8:
        up, up_scales = quantized_weight(weights.fc1_weight, dtype)
        down, down_scales = quantized_weight(weights.fc2_weight, dtype)
        scales = up_scales.view(groups, -1), down_scales.flatten()
    else:
        up, down, scales = weights.fc1_weight.to(dtype), weights.fc2_weight.to(dtype), (None, None)
    up = up.unflatten(0, (groups, -1)).transpose(1, 2)  # [groups, C, units]
    down = down.unflatten(1, (groups, -1)).permute(1, 2, 0)  # [groups, units, C]
    down = F.pad(down, (0, 0, 0, -down.shape[1] % WIDTH))
    second = pack(down.flatten(0, 1).unsqueeze(0), scales[1])
    if dtype == torch.int8:
        offsets = 128 * column_sums(down)  # those of experts that are off are not subtracted
        second = second._replace(offsets=cpu.padded(offsets, WIDTH))
    bias1, bias2 = weights.fc1_bias.float().view(groups, -1), weights.fc2_bias.float()
    return Packed(pack(up, scales[0]), cpu.padded(bias1, WIDTH), second, cpu.padded(bias2, WIDTH))


@functools.cache
def _library() -> ctypes.CDLL:
    library = brgemm.library()
    library.brgemm_expert_ffn.argtypes = 4 * [ctypes.c_int] + 11 * [ctypes.c_void_p] + 6 * [ctypes.c_int]
    return library
