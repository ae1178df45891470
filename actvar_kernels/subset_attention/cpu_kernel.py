"""Subset attention in C++: QK norm, appending to the cache, and attention in one pass over each head."""

from __future__ import annotations

import ctypes

import torch

from actvar_kernels import cpu


def subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    cached: int,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    append: bool,
    level: int | None = None,
) -> torch.Tensor:
    """As the operator `subset_attention`, or `subset_attention_append` with `append`, with sums in float32.

    Args:
        q, k, v, keys, values: float32 or bfloat16, all of one type.
        level: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    level = cpu.best_level() if level is None else level
    R, H, K, d = q.shape
    tensors = [t if t is None or t.stride(3) == 1 else t.contiguous() for t in (q, k, v, keys, values)]
    if append and (tensors[3] is not keys or tensors[4] is not values):
        raise ValueError("keys, values: expected neighbouring numbers of a head in the cache")
    head_scale = None if head_scale is None else head_scale.float().contiguous()
    out = q.new_empty(R, K, H * d)
    strides = [stride for t in tensors for stride in (t.stride()[:3] if t is not None else (0, 0, 0))]
    sizes = cpu.checked_sizes(R, H, K, k.shape[2], cached, d)
    failed = cpu.library().subset_attention(
        level,
        int(q.dtype == torch.bfloat16),
        *cpu.pointers(*tensors, head_scale, out),
        (ctypes.c_int64 * 15)(*strides),
        *sizes,
        int(append),
        ctypes.c_float(softmax_scale),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"subset_attention: no memory for {cached + k.shape[2]} keys of {d} numbers")
    return out
