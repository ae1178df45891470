"""Run GroupNorm with SiLU in two or three Triton launches, and a residual in one, on images `[positions, C]`."""

# A launch takes options that the kernel does not name; Triton's own functions have no results outside a kernel.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.group_norm.tiles import group_norm_tiles
from actvar_kernels.triton_backend.tiles import architecture, most_registers


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    offset: torch.Tensor | None,
    moments: torch.Tensor | None = None,
    part: int | None = None,
) -> torch.Tensor:
    """Return what `reference.group_norm_silu` does, in the memory format `channels_last`.

    The first launch reads x for mean and sum of squared deviations of every channel in every part of an image, except
    where `moments` are these already, of parts of `part` positions or of the tiles'. The second joins them in a fixed
    order. The third reads x again.
    """
    B, C, H, W = x.shape
    rows = _rows(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return out
    positions, tiles = H * W, group_norm_tiles(B, H * W, C)
    affine = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(C, tiles.channels)
    if moments is None:
        moments = torch.empty(B, 2, tiles.parts, C, dtype=torch.float32, device=x.device)
        _channel_moments[(tiles.parts * blocks, B)](
            rows,
            moments,
            rows.stride(0),
            positions,
            tiles.part,
            tiles.parts,
            C=C,
            BLOCK_C=tiles.channels,
            ROWS=tiles.rows // tiles.loads,
            LOADS=tiles.loads,
            num_warps=4,
            enable_fp_fusion=True,
        )
    _join_groups[(groups, B)](
        moments,
        None if offset is None else offset.contiguous(),
        weight.contiguous(),
        affine,
        positions,
        tiles.part if part is None else part,
        moments.shape[2],
        eps,
        C=C,
        SIZE=C // groups,
        BLOCK_S=triton.next_power_of_2(C // groups),
        BLOCK_P=triton.next_power_of_2(moments.shape[2]),
        num_warps=4,
        enable_fp_fusion=True,
    )
    _normalize_channels[(triton.cdiv(positions, tiles.rows) * blocks, B)](
        rows,
        affine,
        bias.contiguous(),
        out,
        rows.stride(0),
        positions,
        SILU=silu,
        C=C,
        BLOCK_C=tiles.channels,
        ROWS=tiles.rows,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def add_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return what `reference.add_residual` does, in the memory format `channels_last`."""
    B, C, H, W = x.shape
    dtype = torch.promote_types(x.dtype, update.dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    if not x.numel():
        return out
    x, update = _rows(x), _rows(update)
    tiles = group_norm_tiles(B, H * W, C)
    grid = (triton.cdiv(H * W, tiles.rows) * triton.cdiv(C, tiles.channels), B)
    _add_residual[grid](
        x,
        update,
        bias.contiguous(),
        out,
        x.stride(0),
        update.stride(0),
        H * W,
        C=C,
        BLOCK_C=tiles.channels,
        ROWS=tiles.rows,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def add_residual_moments(
    x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `reference.add_residual_moments` does, the sum in the memory format `channels_last`."""
    B, C, H, W = x.shape
    dtype = torch.promote_types(x.dtype, update.dtype)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    if not x.numel():
        return out, torch.zeros(B, 2, 1, C, dtype=torch.float32, device=x.device)
    tiles = group_norm_tiles(B, H * W, C)
    moments = torch.empty(B, 2, tiles.parts, C, dtype=torch.float32, device=x.device)
    x, update = _rows(x), _rows(update)
    # the compiler would spill to let one more program share a multiprocessor
    registers = most_registers(128 if architecture(x) in (86, 89) else None)
    _add_and_measure[(tiles.parts * triton.cdiv(C, tiles.channels), B)](
        x,
        update,
        bias.contiguous(),
        out,
        moments,
        x.stride(0),
        update.stride(0),
        H * W,
        tiles.part,
        tiles.parts,
        C=C,
        BLOCK_C=tiles.channels,
        ROWS=tiles.rows // tiles.loads,
        LOADS=tiles.loads,
        num_warps=4,
        enable_fp_fusion=True,
        **registers,
    )
    return out, moments


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return images `[B, C, H, W]` as `[B, positions, C]`, with positions one after the other in memory.

    Images that do not lie so are copied.
    """
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


@triton.jit(do_not_specialize=["positions", "part_length", "parts"])
def _channel_moments(
    x_ptr,
    moments_ptr,
    image_stride,
    positions,
    part_length,
    parts,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Store mean and sum of squared deviations of some channels in a part of an image.

    Distances to the first position of the part are summed, so that a large mean takes no digits.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    start = part * part_length
    count = tl.minimum(part_length, positions - start)
    x_ptr += image * image_stride + start.to(tl.int64) * C + channel
    first = tl.load(x_ptr, mask=inside, other=0.0)
    nothing = tl.broadcast_to(first[None, :], (ROWS, BLOCK_C))
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for begin in range(0, count, LOADS * ROWS):
        for load in tl.static_range(LOADS):
            row = begin + load * ROWS + tl.arange(0, ROWS)
            present = (row < count)[:, None] & inside[None, :]
            x = tl.load(x_ptr[None, :] + row.to(tl.int64)[:, None] * C, mask=present, other=nothing)
            distance = x.to(tl.float32) - first.to(tl.float32)[None, :]
            sums += distance
            squares += distance * distance
    total = tl.sum(sums, axis=0)
    distance = total / count
    target = moments_ptr + (image * 2 * parts + part) * C + channel
    tl.store(target, first.to(tl.float32) + distance, mask=inside)
    tl.store(target + parts * C, tl.maximum(tl.sum(squares, axis=0) - distance * total, 0.0), mask=inside)


@triton.jit(do_not_specialize=["positions", "part_length", "parts", "eps"])
def _join_groups(
    moments_ptr,
    offset_ptr,
    weight_ptr,
    affine_ptr,
    positions,
    part_length,
    parts,
    eps,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Store for the channels of a group what is to be subtracted from x, and the factor of the difference."""
    image = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, BLOCK_S)
    channel = tl.program_id(0) * SIZE + member
    inside = member < SIZE
    part = tl.arange(0, BLOCK_P)
    present = (part < parts)[:, None] & inside[None, :]
    source = moments_ptr + image * 2 * parts * C + part[:, None] * C + channel[None, :]
    mean = tl.load(source, mask=present, other=0.0)
    squared = tl.load(source + parts * C, mask=present, other=0.0)
    offset = tl.zeros((BLOCK_S,), tl.float32)
    if offset_ptr is not None:
        offset += tl.load(offset_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        mean += offset[None, :]
    # means as distances to one of them, so that a large one takes no digits of the sum either
    near = tl.load(moments_ptr + image * 2 * parts * C + tl.program_id(0) * SIZE)
    count = tl.minimum(part_length, positions - part * part_length).to(tl.float32)[:, None]
    numbers = SIZE * positions.to(tl.float32)
    distance = tl.where(present, mean - near, 0.0)
    of_mean = tl.sum(tl.sum(distance * count, axis=0), axis=0) / numbers
    deviation = tl.where(present, distance - of_mean, 0.0)
    variance = tl.sum(tl.sum(squared + count * deviation * deviation, axis=0), axis=0) / numbers
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    target = affine_ptr + image * 2 * C + channel
    tl.store(target, near + of_mean - offset, mask=inside)
    tl.store(target + C, weight * tl.rsqrt(variance + eps), mask=inside)


@triton.jit(do_not_specialize=["positions"])
def _normalize_channels(
    x_ptr,
    affine_ptr,
    bias_ptr,
    out_ptr,
    image_stride,
    positions,
    SILU: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise `ROWS` positions of some channels of an image."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * C + channel[None, :]
    present = (row < positions)[:, None] & inside[None, :]
    x = tl.load(x_ptr + image * image_stride + place, mask=present, other=0.0).to(tl.float32)
    center = tl.load(affine_ptr + image * 2 * C + channel, mask=inside, other=0.0)
    scale = tl.load(affine_ptr + image * 2 * C + C + channel, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    y = (x - center[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + image * positions * C + place, y.to(out_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["positions"])
def _add_residual(
    x_ptr,
    update_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    update_stride,
    positions,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add at `ROWS` positions of some channels of an image."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * C + channel[None, :]
    present = (row < positions)[:, None] & inside[None, :]
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + image * x_stride + place, mask=present, other=0.0).to(tl.float32)
    update = tl.load(update_ptr + image * update_stride + place, mask=present, other=0.0).to(tl.float32)
    out = x + (update + bias[None, :])
    tl.store(out_ptr + image * positions * C + place, out.to(out_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["positions", "part_length", "parts"])
def _add_and_measure(
    x_ptr,
    update_ptr,
    bias_ptr,
    out_ptr,
    moments_ptr,
    x_stride,
    update_stride,
    positions,
    part_length,
    parts,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Add some channels in a part of an image, and store their moments as `_channel_moments` does, of stored sums."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(0) // BLOCKS
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    start = part * part_length
    count = tl.minimum(part_length, positions - start)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    place = start.to(tl.int64) * C + channel
    x_ptr += image * x_stride + place
    update_ptr += image * update_stride + place
    out_ptr += image * positions * C + place
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(update_ptr, mask=inside, other=0.0).to(tl.float32) + bias
    first = (tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32) + first).to(dtype).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for begin in range(0, count, LOADS * ROWS):
        for load in tl.static_range(LOADS):
            row = begin + load * ROWS + tl.arange(0, ROWS)
            present = (row < count)[:, None] & inside[None, :]
            step = row.to(tl.int64)[:, None] * C
            x = tl.load(x_ptr[None, :] + step, mask=present, other=0.0).to(tl.float32)
            update = tl.load(update_ptr[None, :] + step, mask=present, other=0.0).to(tl.float32)
            out = (x + (update + bias[None, :])).to(dtype)
            tl.store(out_ptr[None, :] + step, out, mask=present)
            distance = tl.where(present, out.to(tl.float32) - first[None, :], 0.0)
            sums += distance
            squares += distance * distance
    total = tl.sum(sums, axis=0)
    distance = total / count
    target = moments_ptr + (image * 2 * parts + part) * C + channel
    tl.store(target, first + distance, mask=inside)
    tl.store(target + parts * C, tl.maximum(tl.sum(squares, axis=0) - distance * total, 0.0), mask=inside)
