"""GroupNorm with SiLU in two Triton launches, and a residual in one, on images `[positions, C]`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.tiles import group_norm_tiles


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    offset: torch.Tensor | None,
) -> torch.Tensor:
    """As `reference.group_norm_silu`, in the memory format `channels_last`.

    The first launch writes mean and sum of squared deviations for every group of every part of an image; the second
    one joins the parts, in the same order in every program, and normalises.
    """
    B, C, H, W = x.shape
    rows = _rows(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if not x.numel():
        return out
    positions, tiles = H * W, group_norm_tiles(B, H * W, C)
    weight, bias = weight.contiguous(), bias.contiguous()
    offset = None if offset is None else offset.contiguous()
    statistics = torch.empty(B, tiles.parts, 2, groups, dtype=torch.float32, device=x.device)
    _group_statistics[(tiles.parts, B)](
        rows,
        offset,
        statistics,
        rows.stride(0),
        positions,
        tiles.part,
        GROUPS=groups,
        BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_S=triton.next_power_of_2(C // groups),
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.part_rows,
        num_warps=8,
    )
    blocks = triton.cdiv(C, tiles.channels)
    _normalize_groups[(triton.cdiv(positions, tiles.rows * tiles.steps) * blocks, B)](
        rows,
        offset,
        statistics,
        weight,
        bias,
        out,
        rows.stride(0),
        positions,
        tiles.part,
        tiles.parts,
        eps,
        SILU=silu,
        GROUPS=groups,
        BLOCK_P=triton.next_power_of_2(tiles.parts),
        C=C,
        BLOCK_C=tiles.channels,
        ROWS=tiles.rows,
        STEPS=tiles.steps,
        num_warps=4,
    )
    return out


def add_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `reference.add_residual`, in the memory format `channels_last`."""
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
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`[B, positions, C]` with an image's positions one after the other in memory, copied where they are not."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


@triton.jit(do_not_specialize=["positions", "part_length"])
def _group_statistics(
    x_ptr,
    offset_ptr,
    statistics_ptr,
    image_stride,
    positions,
    part_length,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and sum of squared deviations of every group in a part of an image. Sums are those of the distance to the
    part's first position, so that a large mean takes no digits."""
    image, part = tl.program_id(1), tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    inside = channel < C
    start = part * part_length
    count = tl.minimum(part_length, positions - start)
    x_ptr += image.to(tl.int64) * image_stride + start.to(tl.int64) * C
    first = tl.load(x_ptr + channel, mask=inside, other=0.0)
    nothing = tl.broadcast_to(first[None, :], (ROWS, BLOCK_C))
    sums = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)
        present = (row < count)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=present, other=nothing)
        distance = x.to(tl.float32) - first.to(tl.float32)[None, :]
        sums += distance
        squares += distance * distance
    total = tl.sum(sums, axis=0)
    distance = total / count
    squared = tl.maximum(tl.sum(squares, axis=0) - distance * total, 0.0)
    mean = first.to(tl.float32) + distance
    if offset_ptr is not None:
        mean += tl.load(offset_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    SIZE: tl.constexpr = C // GROUPS
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    there = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    which = tl.reshape(tl.where(there, group[:, None] * SIZE + member[None, :], 0), (BLOCK_G * BLOCK_S,))
    mean = tl.where(there, tl.reshape(tl.gather(mean, which, 0), (BLOCK_G, BLOCK_S)), 0.0)
    squared = tl.where(there, tl.reshape(tl.gather(squared, which, 0), (BLOCK_G, BLOCK_S)), 0.0)
    group_mean = tl.sum(mean, axis=1) / SIZE
    deviation = tl.where(there, mean - group_mean[:, None], 0.0)
    group_squared = tl.sum(squared + count * deviation * deviation, axis=1)
    target = statistics_ptr + (image.to(tl.int64) * tl.num_programs(0) + part) * 2 * GROUPS + group
    tl.store(target, group_mean, mask=group < GROUPS)
    tl.store(target + GROUPS, group_squared, mask=group < GROUPS)


@triton.jit(do_not_specialize=["positions", "part_length", "parts", "eps"])
def _normalize_groups(
    x_ptr,
    offset_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    image_stride,
    positions,
    part_length,
    parts,
    eps,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`STEPS * ROWS` positions of some channels of an image."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SIZE: tl.constexpr = C // GROUPS
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C

    part = tl.arange(0, BLOCK_P)
    statistics_ptr += image * parts * 2 * GROUPS + channel // SIZE
    count = tl.maximum(tl.minimum(part_length, positions - part * part_length), 0).to(tl.float32)[:, None]
    there = (part < parts)[:, None] & inside[None, :]
    first = tl.load(statistics_ptr, mask=inside, other=0.0)
    mean = tl.load(statistics_ptr[None, :] + (part * 2 * GROUPS)[:, None], mask=there, other=0.0)
    squared = tl.load(statistics_ptr[None, :] + (part * 2 * GROUPS + GROUPS)[:, None], mask=there, other=0.0)
    distance = tl.where(there, mean - first[None, :], 0.0)
    of_mean = tl.sum(distance * count, axis=0) / positions
    deviation = distance - of_mean[None, :]
    variance = tl.sum(squared + SIZE * count * deviation * deviation, axis=0) / (SIZE * positions.to(tl.float32))
    center = first + of_mean
    if offset_ptr is not None:
        center -= tl.load(offset_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(variance + eps) * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    first_row = tl.program_id(0) // BLOCKS * STEPS * ROWS
    for step in range(STEPS):
        row = first_row + step * ROWS + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * C + channel[None, :]
        present = (row < positions)[:, None] & inside[None, :]
        x = tl.load(x_ptr + image * image_stride + place, mask=present, other=0.0).to(tl.float32)
        y = (x - center[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        target = out_ptr + image * positions * C + place
        tl.store(target, y.to(out_ptr.dtype.element_ty), mask=present)


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
    """`ROWS` positions of some channels of an image."""
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
