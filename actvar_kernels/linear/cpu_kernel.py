"""A linear layer in C++, its weight packed once."""

from __future__ import annotations

import torch

from actvar_kernels import cpu
from actvar_kernels.packing import packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, level: int | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` with sums in float32.

    Args:
        x: `[..., C]` float32 or bfloat16; a weight `[D, C]` of another type is converted when it is packed.
        level: instruction set; None: the highest.
    """
    level = cpu.best_level() if level is None else level
    layout = cpu.layout_of(level)
    dtype, D = x.dtype, weight.shape[0]

    def pack() -> torch.Tensor:
        return cpu.panels(weight.detach().to(dtype).t().unsqueeze(0), layout).flatten()

    copy = packed((weight,), (dtype, level), pack)
    x = cpu.padded(x, layout.step if dtype == torch.bfloat16 else 1)
    bias = cpu.padded(bias.detach().float(), layout.lanes)
    out = x.new_empty(*x.shape[:-1], D)
    sizes = cpu.checked_sizes(x.numel() // x.shape[-1], x.shape[-1], D)
    cpu.library().linear(
        level, int(dtype == torch.bfloat16), *cpu.pointers(x, copy, bias, out), *sizes, torch.get_num_threads()
    )
    return out
