"""Attend in C++: QK norm, append to the cache, and attention in one pass over each head."""

from __future__ import annotations

import ctypes
import functools

import torch

from actvar_kernels.cpu_backend import brgemm, cpu


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
    isa: int | None = None,
    by_pytorch: bool | None = None,
) -> torch.Tensor:
    """Run the operator `subset_attention`, or with `append` `subset_attention_append`, with sums in float32.

    Args:
        q, k, v, keys, values: as in the operators, one of `cpu.DTYPES` for all.
        cached: rows of the cache that are attended to.
        head_scale: `[H]`, floating-point, or None.
        softmax_scale: factor of the scores.
        append: whether `k` and `v` are written to the cache.
        isa: instruction set; None: the highest.
        by_pytorch: whether the products are PyTorch's (`brgemm`), for bfloat16 on instruction sets that have it; None:
            where the processor has tiles.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    isa = cpu.best_isa() if isa is None else isa
    if by_pytorch is None:
        by_pytorch = brgemm.has_tiles(q.dtype)
    by_pytorch = by_pytorch and cpu.layout_of(isa, q.dtype).step == 2
    R, H, K, d = q.shape
    tensors = [t if t is None or t.stride(3) == 1 else t.contiguous() for t in (q, k, v, keys, values)]
    if append and (tensors[3] is not keys or tensors[4] is not values):
        raise ValueError("keys, values: expected neighbouring numbers of a head in the cache")
    head_scale = None if head_scale is None else head_scale.float().contiguous()
    out = q.new_empty(R, K, H * d)
    strides = _Strides()
    for position, tensor in enumerate(tensors):
        if tensor is not None:
            strides[3 * position : 3 * position + 3] = tensor.stride()[:3]
    sizes = cpu.checked_sizes(R, H, K, k.shape[2], cached, d)
    failed = _library().subset_attention(
        isa,
        cpu.kind_of(q.dtype),
        *[None if tensor is None else tensor.data_ptr() for tensor in (*tensors, head_scale, out)],
        strides,
        *sizes,
        append,
        softmax_scale,
        by_pytorch,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"subset_attention: no memory for {cached + k.shape[2]} keys of {d} numbers")
    return out


_Strides = ctypes.c_int64 * 15


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    if brgemm.runs(torch.bfloat16):
        library = brgemm.library()
    integer = ctypes.c_int
    library.subset_attention.argtypes = (
        2 * [integer] + 7 * [ctypes.c_void_p] + [_Strides] + 7 * [integer] + [ctypes.c_float, integer, integer]
    )
    return library
