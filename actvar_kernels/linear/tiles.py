"""Choose block sizes of the kernels of linear layers, by architecture and shape."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.triton_backend.tiles import RDNA, ProductTiles, RowTiles, cdiv, next_power_of_2, row_tiles


class ByteTiles(NamedTuple):
    """Describe a product of bytes.

    Attributes:
        rows: rows of a tile.
        product: the rest of the tile.
        parts: parts in which a tile is stored.
    """

    rows: int
    product: ProductTiles
    parts: int


def product_tiles(arch: int, tokens: int, columns: int, multiprocessors: int) -> ByteTiles:
    """Return the tiles of a product of bytes that give the busiest multiprocessor the least work.

    The rate of tiles below 128 x 128 is taken to follow what they multiply for each byte that they read.

    Args:
        arch: compute capability.
        tokens: rows of the left factor.
        columns: columns of the result.
        multiprocessors: number of them on the GPU.
    """

    def work(size: ByteTiles) -> float:
        programs = cdiv(tokens, size.rows) * cdiv(columns, size.product.columns)
        rows, columns_of_tile = size.rows, size.product.columns
        rate = min(1, rows * columns_of_tile / (rows + columns_of_tile) / 64)
        return cdiv(programs, multiprocessors) * rows * columns_of_tile / rate

    return min(product_candidates(arch), key=work)


def product_candidates(arch: int) -> list[ByteTiles]:
    """Return tiles of a product of bytes from large to small."""
    deep = 128 if arch in (90, 100) else 64
    return [
        ByteTiles(128, ProductTiles(128, 0, deep, warps=8, stages=4), parts=4 if arch == 100 else 2),
        ByteTiles(64, ProductTiles(64, 0, 128, warps=4, stages=4), parts=1),
        ByteTiles(32, ProductTiles(64, 0, 128, warps=4, stages=4), parts=1),
        ByteTiles(16, ProductTiles(32, 0, 128, warps=4, stages=4), parts=1),
    ]


def quantizing_tiles(tokens: int, width: int) -> RowTiles:
    """Return tiles of a kernel that quantizes rows, also those of an FFN's hidden units; arguments of `row_tiles`."""
    return row_tiles(tokens, width) if width <= 8192 else RowTiles(rows=1, warps=16)


def layer_tiles(arch: int, dtype: torch.dtype, rows: int) -> tuple[int, ProductTiles]:
    """Return the rows and the rest of the tiles of a product of few rows with the weights of many layers.

    Such a product is bound by the weights, so a program has all rows, up to 128. The shared memory fits every GPU.

    Args:
        arch: compute capability, or `RDNA`, which spills with larger tiles.
        dtype: float32, float16 or bfloat16.
        rows: rows of the left factor.
    """
    if dtype == torch.float32:
        return 16, ProductTiles(32, 0, 64, warps=4, stages=3)
    tile = min(max(16, next_power_of_2(rows)), 64 if arch == RDNA else 128)
    depth = 128 if tile == 16 and arch != RDNA else 64
    return tile, ProductTiles(64, 0, depth, warps=4, stages=3 if tile == 128 else 4)


class FewRowsTiles(NamedTuple):
    """Describe a product of few rows.

    Attributes:
        rows, columns: of the result, of a program.
        step: columns, or terms of a sum, of a step.
        parts: parts of a sum, each of which a warp or a part of one adds up.
        warps: warps of a program.
        stages: pipeline stages.
        registers: as in `ProductTiles`.
    """

    rows: int
    columns: int
    step: int
    parts: int
    warps: int
    stages: int
    registers: int | None = None


BUSY = 0.4
"""Share of the multiprocessors that have a program, with which all of the memory can be drawn on; assumed."""
SMALL_SHARED_MEMORY = (86, 89, 120)
"""Architectures with 99 KiB of it for a program, where others of NVIDIA have 163 and more."""


def normed_block(channels: int) -> int:
    """Return the power of two of channels that are normalised at once, in which each of 4 warps has 16 at least."""
    return max(64, next_power_of_2(channels))


def norm_linear_tiles(
    arch: int, amd: bool, dtype: torch.dtype, rows: int, channels: int, outputs: int, multiprocessors: int
) -> FewRowsTiles:
    """Return the tiles of a product behind a norm, of which a program holds whole rows in registers.

    Args:
        arch: compute capability, or `RDNA`.
        amd: whether the GPU is AMD's, which copies nothing asynchronously and has 64 KiB of shared memory.
        dtype: float32, float16 or bfloat16.
        rows: rows of the left factor.
        channels: up to 2048.
        outputs: columns of the result.
        multiprocessors: number of them on the GPU.
    """
    block = normed_block(channels)
    warps = max(4, block // 128)
    if dtype == torch.float32:
        return FewRowsTiles(4, 32, 4, max(warps, block // 16), warps, stages=1 if amd else 2)
    small = arch in SMALL_SHARED_MEMORY
    tile, step = (8, 8) if small and block > 1024 else (16, 16)
    wide = cdiv(outputs, 64) * cdiv(rows, tile) >= BUSY * multiprocessors
    stages = 1 if amd else 3 if arch in (90, 100) else 2
    # two programs of 8 warps share a multiprocessor; on sm_100 the compiler would spill to let them
    registers = None if amd or arch == 100 else 128
    return FewRowsTiles(tile, 64 if wide else 32, step, warps, warps, stages, registers)


def linear_residual_tiles(arch: int, dtype: torch.dtype, rows: int, outputs: int, multiprocessors: int) -> FewRowsTiles:
    """Return the tiles of a product ahead of a residual; arguments are those of `norm_linear_tiles`."""
    if dtype == torch.float32:
        return FewRowsTiles(16, 16, 64, parts=4, warps=4, stages=3)
    tile = 16 if rows <= 16 else 32
    wide = arch != RDNA and cdiv(outputs, 32) * cdiv(rows, tile) >= BUSY * multiprocessors
    return FewRowsTiles(tile, 32 if wide else 16, 256, parts=4, warps=4, stages=3 if tile == 32 else 4)
