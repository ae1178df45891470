"""Record launches on a virtual GPU, of a kernel of the tests or of any code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.tools.virtual import virtual_gpu


@triton.jit
def scale_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=index < count) * factor, mask=index < count)


def launch_scale(x: torch.Tensor, block: int = 256) -> torch.Tensor:
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), 2.0, BLOCK=block, num_warps=2)
    return out


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def recorded(arch: int, run) -> list:
    with virtual_gpu(arch) as gpu, torch.no_grad():
        run(gpu)
    return gpu.launches
