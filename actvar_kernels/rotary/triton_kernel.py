"""Normalise and rotate the queries or keys of all heads in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.tiles import next_power_of_2

NUMBERS, WARPS = 4096, 4
"""Numbers of a tile, and its warps: a thread has 32."""


def rotate_heads(
    x: torch.Tensor, angles: torch.Tensor, index: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """Return what `reference.rotate_heads` does, for heads of a power of two."""
    R, H, K, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    angles = angles.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = min(next_power_of_2(max(K, 1)), NUMBERS // d)
    _rotate_heads[(triton.cdiv(K, rows), R * H)](
        x,
        angles,
        index,
        scale,
        out,
        x.stride(),
        (0, 0) if index is None else index.stride(),
        angles.stride(0),
        K,
        HEADS=H,
        HEAD_DIM=d,
        ROWS=rows,
        num_warps=WARPS,
        **early_launch(x),
    )
    return out


@triton.jit(do_not_specialize=["length"])
def _rotate_heads(
    x_ptr,
    angles_ptr,
    index_ptr,
    scale_ptr,
    out_ptr,
    x_strides,
    index_strides,
    sines,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise and rotate `ROWS` rows of one head of a sequence; sines lie `sines` numbers behind the cosines."""
    begin(PDL)
    sequence = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (row < length)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    pair = tl.arange(0, HEAD_DIM // 2)

    offset = sequence * x_strides[0] + head * x_strides[1] + row.to(tl.int64)[:, None] * x_strides[2] + channel[None, :]
    x = tl.load(x_ptr + offset, mask=present, other=0.0).to(tl.float32)
    root = tl.sqrt(tl.sum(x * x, axis=1))
    factor = 1.0 / tl.maximum(root, 1e-12)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr + head).to(tl.float32)
    x *= factor[:, None]

    token = row
    if index_ptr is not None:
        token = tl.load(index_ptr + sequence * index_strides[0] + row * index_strides[1], mask=row < length, other=0)
    angle = angles_ptr + token.to(tl.int64)[:, None] * (HEAD_DIM // 2) + pair[None, :]
    cosine = tl.load(angle, mask=present, other=0.0).to(tl.float32)
    sine = tl.load(angle + sines, mask=present, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(x, (ROWS, HEAD_DIM // 2, 2)))
    turned = tl.join(cosine * first - sine * second, sine * first + cosine * second)
    out = tl.reshape(turned, (ROWS, HEAD_DIM)).to(out_ptr.dtype.element_ty)
    target = ((sequence * HEADS + head) * length + row)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out_ptr + target, out, mask=present)
