"""Block sizes, warps and pipeline stages of the Triton kernels, by architecture and shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def architecture(tensor: torch.Tensor) -> int:
    """Compute capability that the kernels are tuned for: the highest of `ARCHITECTURES` that the GPU reaches, else 80;
    80 in Triton's interpreter."""
    if not tensor.is_cuda:
        return 80
    capability = triton.runtime.driver.active.get_current_target().arch
    return max((known for known in ARCHITECTURES if known <= capability), default=80)


class AttentionTiles(NamedTuple):
    """`queries` and `keys` per tile."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_tiles(arch: int, dtype: torch.dtype, head_dim: int) -> AttentionTiles:
    if dtype == torch.float32:
        return AttentionTiles(queries=32, keys=32, warps=4, stages=2)
    return AttentionTiles(queries=64, keys=64, warps=4, stages=3)
