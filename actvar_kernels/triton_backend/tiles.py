"""Choose block sizes, warps and pipeline stages of the Triton kernels, by architecture and shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
import triton

from actvar_kernels.triton_backend.forced import Forced

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
RDNA = 0
"""Stand for a GPU of AMD with waves of 32 threads, in place of a compute capability."""

# Triton's annotations do not say that they give numbers for numbers.
cdiv = cast(Callable[[int, int], int], triton.cdiv)
next_power_of_2 = cast(Callable[[int], int], triton.next_power_of_2)


def architecture(tensor: torch.Tensor) -> int:
    """Return the compute capability that the kernels are tuned for.

    This is the highest of `ARCHITECTURES` that the GPU reaches, otherwise 80. It is 80 in Triton's interpreter and on
    GPUs of AMD with waves of 64 threads, and `RDNA` on those with 32.
    """
    if not tensor.is_cuda:
        return 80
    target: Any = triton.runtime.driver.active.get_current_target()  # whose type does not tell what drivers give
    if target.backend == "hip":
        return RDNA if target.warp_size == 32 else 80
    return max((known for known in ARCHITECTURES if known <= target.arch), default=80)


def is_amd(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is on a GPU of AMD."""
    return tensor.is_cuda and cast(Any, triton.runtime.driver.active).get_current_target().backend == "hip"


def multiprocessors(tensor: torch.Tensor) -> int:
    """Return the number of multiprocessors of the GPU that `tensor` is on; in Triton's interpreter that of an A100."""
    if not tensor.is_cuda:
        return 108
    driver: Any = triton.runtime.driver.active  # whose type does not tell what drivers have
    return _multiprocessors(driver, driver.get_current_device())


@functools.cache
def _multiprocessors(driver: Any, device: int) -> int:
    return driver.utils.get_device_properties(device)["multiprocessor_count"]


def most_registers(count: int | None) -> dict[str, int]:
    """Return the option of a launch that bounds the registers of a thread; None bounds nothing.

    Triton knows the option for GPUs of NVIDIA alone, where alone `count` is a number.
    """
    return {} if count is None else {"maxnreg": count}


class RowTiles(NamedTuple):
    """Describe kernels that hold whole rows in registers.

    Attributes:
        rows: rows of a program.
        warps: warps of a program.
    """

    rows: int
    warps: int


def row_tiles(tokens: int, width: int) -> RowTiles:
    """Return tiles of a kernel without a router.

    A thread has up to 32 numbers, so that many programs hide each other's latency.

    Args:
        tokens: rows of all sequences.
        width: channels of a row.
    """
    return _row_tiles(tokens, width, numbers=32, programs=256)


def score_tiles(width: int) -> RowTiles:
    """Return tiles of a selector's scores: warps have whole rows up to a width of 2048, and wait for no others.

    Args:
        width: channels of a row.
    """
    block = next_power_of_2(width)
    return RowTiles(rows=max(1, 2048 // block), warps=max(1, block // 2048))


class RouteTiles(NamedTuple):
    """Describe kernels with a router.

    Attributes:
        rows: rows of a program.
        warps: warps of a program.
        splits: parts of the channels that tensor cores sum apart; 0: no tensor cores.
    """

    rows: int
    warps: int
    splits: int = 0


def route_tiles(arch: int, tokens: int, width: int, dtype: torch.dtype) -> RouteTiles:
    """Return tiles of a kernel with a router, which sums over all channels for every expert.

    Rows of bfloat16 are multiplied by tensor cores, 16 at a time, so that a program reads the weights once for all of
    them. Beyond 1024 channels they would not fit into registers.

    Otherwise a warp or two have two rows where rows are plentiful, and need not wait for others. Where rows are few
    there are 8 warps, and single rows up to a width of 2048. With other numbers the compiler spills in some type.

    Args:
        arch: compute capability.
        tokens: rows of all sequences.
        width: channels of a row.
        dtype: float32, float16 or bfloat16, that of the rows.
    """
    block = next_power_of_2(width)
    if dtype == torch.bfloat16 and 16 <= block <= 1024 and arch != RDNA:
        warps = max(4, block // 128)
        return RouteTiles(rows=16, warps=warps, splits=min(warps, block // 16))
    if tokens >= 2048:
        return RouteTiles(rows=2, warps=max(1, block // 1024))
    return RouteTiles(rows=2 if width > 2048 else 1, warps=8)


class SelectTiles(NamedTuple):
    """Describe token selection.

    Attributes:
        rows: rows at a time.
        warps: warps of a program.
        steps: how often a program takes `rows` rows.
    """

    rows: int
    warps: int
    steps: int


def select_tiles(sequences: int, rows: int, width: int) -> SelectTiles:
    """Return tiles of token selection; several tiles share a ranking where programs are plentiful.

    Args:
        sequences: number of sequences.
        rows: rows that are read of each.
        width: channels of a row.
    """
    at_once, warps = row_tiles(sequences * rows, width)
    return SelectTiles(at_once, warps, steps=min(8, max(1, sequences * rows // (512 * at_once))))


def _row_tiles(tokens: int, width: int, numbers: int, programs: int) -> RowTiles:
    """Return tiles of at most about `numbers` elements a thread, with fewer rows below that many `programs`."""
    block = next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    rows = max(1, 32 * warps * numbers // block)
    while rows > 1 and tokens < programs * rows:
        rows //= 2
    return RowTiles(rows, warps if rows > 1 or block <= 1024 else 8)


class SortTiles(NamedTuple):
    """Describe the sort.

    Attributes:
        rows: tokens of a program.
        chunk: tokens that they are compared with at a time.
        warps: warps of a program.
    """

    rows: int
    chunk: int
    warps: int


SORT = SortTiles(rows=256, chunk=2048, warps=16)


class ProductTiles(NamedTuple):
    """Describe a matrix product.

    Attributes:
        columns: columns of a tile, a power of two.
        tail: more columns beside them, a power of two or 0.
        depth: depth of a step.
        warps: warps of a program.
        stages: pipeline stages.
        registers: registers that a thread may have; None: as many as the compiler finds best.
    """

    columns: int
    tail: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


class ExpertTiles(NamedTuple):
    """Describe the two products of the expert FFN.

    Attributes:
        rows: tokens of a tile, the same for both products.
        up, down: the products.
        parts: parts in which the down projection stores a tile.
        descriptors: whether matrices are read by tensor descriptors, for which tiles have to divide an expert, or by
            masked pointers.
    """

    rows: int
    up: ProductTiles
    down: ProductTiles
    parts: int
    descriptors: bool


def expert_ffn_tiles(
    arch: int,
    dtype: torch.dtype,
    tokens: int,
    channels: int,
    width: int,
    aligned: bool,
    multiprocessors: int,
    measured: tuple[int, int] | None = None,
) -> ExpertTiles:
    """Return the tiles that give the busiest multiprocessor the least work in the down projection.

    That projection has fewer programs than the up projection. The larger tiles win where the work is equal. Small ones
    are taken to run at 0.6 of the rate.

    Args:
        arch: compute capability.
        dtype: float32, float16 or bfloat16.
        tokens, channels: rows and columns of the input.
        width: hidden units of an expert.
        aligned: whether tensor descriptors can be made of the matrices.
        multiprocessors: number of them on the GPU.
        measured: rows and columns of the tiles that were measured to be fastest, or None. They need not be among the
            masked ones for matrices that are not aligned.
    """
    if _forced.value is not None:
        return _forced.value
    sizes = expert_ffn_candidates(arch, dtype, width, aligned)
    for size in sizes:
        if measured == (size.rows, size.down.columns):
            return size

    def work(size: ExpertTiles) -> float:
        programs = cdiv(tokens, size.rows) * cdiv(channels, size.down.columns)
        elements = size.rows * size.down.columns
        return cdiv(programs, multiprocessors) * elements / (1 if elements >= 128 * 128 else 0.6)

    return min(sizes, key=work)


_forced = Forced[ExpertTiles]()


def using_expert_tiles(tile: ExpertTiles) -> AbstractContextManager[None]:
    """Make every expert FFN take `tile` for the duration of the context."""
    return _forced.using(tile)


def expert_ffn_candidates(arch: int, dtype: torch.dtype, width: int, aligned: bool) -> list[ExpertTiles]:
    """Return tiles from large to small.

    Args:
        arch, dtype, width, aligned: as in `expert_ffn_tiles`.
    """
    if dtype == torch.float32:
        up = ProductTiles(*_columns(width, (64, 0)), depth=16, warps=8, stages=2)
        return [ExpertTiles(128, up, ProductTiles(64, 0, 16, 8, 2), parts=1, descriptors=False)]
    deep = width % 64 == 0
    wide = _columns(width, (256, 0), (128, 64), (128, 32), (128, 0), (64, 32), (64, 0))
    if arch in (90, 100) and aligned and width % 32 == 0 and width % sum(wide) == 0:
        narrow = _columns(width, (64, 0), (64, 32), (32, 0))
        up = ProductTiles(*wide, depth=64, warps=8, stages=3)
        down = ProductTiles(256, 0, depth=64 if deep else 32, warps=8, stages=3 if deep else 5)
        small_up = ProductTiles(*narrow, depth=64, warps=4, stages=4)
        small_down = ProductTiles(64, 0, depth=down.depth, warps=4, stages=4 if deep else 6)
        return [
            ExpertTiles(128, up, down, parts=4, descriptors=True),
            ExpertTiles(128, up, down._replace(columns=128), parts=2, descriptors=True),
            ExpertTiles(64, small_up, small_down, parts=1, descriptors=True),
        ]
    wide = _columns(width, (128, 0), (128, 64), (128, 32), (64, 32), (64, 0))
    narrow = _columns(width, (64, 0), (64, 32))
    up = ProductTiles(*wide, depth=32, warps=8 if wide[1] else 4, stages=4)
    if arch == RDNA:
        up = up._replace(warps=16 if wide[1] else 8)
    if arch == 120 and wide[1]:
        up = up._replace(registers=255)  # the compiler would spill to let two programs share a multiprocessor
    down = ProductTiles(128, 0, depth=32, warps=8 if arch == RDNA else 4, stages=4)
    small_up = ProductTiles(*narrow, depth=32, warps=4, stages=4)
    small_down = ProductTiles(64, 0, depth=64 if deep else 32, warps=4, stages=3 if deep else 4)
    return [
        ExpertTiles(128, up, down, parts=4, descriptors=False),
        ExpertTiles(64, small_up, small_down, parts=1, descriptors=False),
    ]


def _columns(width: int, *choices: tuple[int, int]) -> tuple[int, int]:
    """Return the first choice whose sum divides `width`, otherwise one masked tile size.

    That is a power of two up to the columns of the first choice.
    """
    for columns, tail in choices:
        if width % (columns + tail) == 0:
            return columns, tail
    return max(16, min(next_power_of_2(width), choices[0][0])), 0


def sampling_warps(block: int) -> int:
    """Return the warps of a sampler, at most 16.

    A thread has 32 tokens, so that a sum over all of them costs little beside its terms.

    Args:
        block: tokens of a program.
    """
    return min(16, max(1, block // 1024))
