"""Predict the time of a kernel launch on a GPU, by a roofline with waves and a cost per launch.

Every constant of the model is in the tables below. Those of sm_90 are fitted to what an H100 SXM measured
(`benchmarks/results/nvidia-h100-80gb-hbm3.csv`): `tests/kernels/test_measured_h100.py` holds blocks and the rest of
whole samples of d16 to 10 %. The others are data sheets and assumptions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from actvar_kernels.tools.virtual import Launch
from actvar_kernels.tools.virtual.cost import Cost, Share, triton_cost
from actvar_kernels.tools.virtual.resources import resources


class Card(NamedTuple):
    """Describe a GPU by its data sheet: dense rates without sparsity.

    `cublas` is the share of the peak that cuBLAS reaches.
    """

    arch: int
    bf16_tflops: float
    fp32_tflops: float  # without tensor cores
    gigabytes_per_second: float
    multiprocessors: int
    gigahertz: float
    cache_megabytes: int  # L2, for orientation; the model takes nothing from it
    cublas: float


# Data sheets: NVIDIA A100 80GB SXM (2023), L40S (2023), H100 SXM (2023), HGX B200 (2024); Ada whitepaper (RTX 4090).
# cublas: "maximum achievable matmul FLOPS", S. Bekman, github.com/stas00/ml-engineering (compute/accelerator), measured
# on A100 and B200 at their best shapes; 0.8 is assumed for the two Ada cards. H100: fitted to the blocks of d16.
CARDS = {
    "a100": Card(80, 312, 19.5, 2039, 108, 1.41, 40, cublas=0.869),
    "l40s": Card(89, 362, 91.6, 864, 142, 2.52, 96, cublas=0.8),
    "rtx4090": Card(89, 165, 82.6, 1008, 128, 2.52, 72, cublas=0.8),
    "h100": Card(90, 989, 66.9, 3350, 132, 1.98, 50, cublas=0.76),
    "b200": Card(100, 2250, 75, 8000, 148, 1.98, 126, cublas=0.776),
}

# From the end of one kernel's work to the start of the next one's in a CUDA graph: gap, first loads, last stores.
# Fitted to the scales of d16 at batch 1 on an H100.
LAUNCH_SECONDS = 3.0e-6
BANDWIDTH = 0.8  # share of the data sheet's: LayerNorm with modulation on an H100
# Of cuBLAS; on the H100 the experts' two products, all blocks run.
TRITON = {80: 0.88, 86: 0.88, 89: 0.88, 90: 0.8, 100: 0.88, 120: 0.88}
# Share of the peak in attention with head size 64, fitted on the H100. FlashAttention-2 reaches about 0.55 on A100 (Dao
# 2023); 0.25 on B200 is assumed.
ATTENTION = {80: 0.55, 86: 0.55, 89: 0.55, 90: 0.18, 100: 0.25, 120: 0.55}
# Of cuBLAS: a convolution reads its pixels nine times, from L2. Fitted on the H100's decoder at batch 64.
CONVOLUTION = 0.8
# TFLOP/s of a convolution in 16 bits with fewer outputs than 64, which cuDNN runs without tensor cores: the decoder's
# last one on an H100, 26.3 ms at batch 64 with 8 outputs.
FEW_OUTPUTS_TFLOPS = 3.7
# Times the rate of products in 16 bits: data sheets. On B200 Triton runs products of int8 by the instruction of older
# GPUs, whose rate is assumed.
EIGHT_BITS = {
    torch.int8: {80: 2, 86: 2, 89: 2, 90: 2, 100: 0.5, 120: 2},
    torch.float8_e4m3fn: {89: 2, 90: 2, 100: 2, 120: 2},
}
VECTOR = 0.7  # share of the fp32 rate, and of the instructions that could be issued, without tensor cores; assumed
INSTRUCTIONS = 4 * 32  # of threads per cycle and multiprocessor: four schedulers, a warp each
# Of these cuBLAS and cuDNN are given the best; assumed.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))
# Share of the rate that products with tiles of at least so many elements reach; fitted on the H100.
TILE_SHARES = ((128 * 128, 1.0), (64 * 128, 0.85), (0, 0.7))
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten._addmm_activation")


class Work(NamedTuple):
    """Hold what the time of a launch depends on.

    Attributes:
        name: of the Triton kernel, or of the ATen operation.
        launches: GPU kernels behind the call.
        bytes, flops: through memory, and executed.
        dtype: of the products' operands, or None without any.
        programs: of a Triton kernel, those that have anything to do; 0 for a library's.
        tile: rows and columns that a program of a Triton product computes, or None.
        attention: whether products wait for a softmax.
        instructions: of a Triton kernel, summed over threads.
        rows, columns: of the result of a library's product or convolution, else 0.
        results: number of such results.
    """

    name: str
    launches: int
    bytes: int
    flops: int
    dtype: torch.dtype | None
    programs: int = 0
    tile: tuple[int, int] | None = None
    attention: bool = False
    instructions: float = 0
    rows: int = 0
    columns: int = 0
    results: int = 1


def seconds(launch: Launch, card: Card, share: Share) -> float:
    """Predict the time of one launch.

    Args:
        share: see `actvar_kernels.tools.virtual.cost`.
    """
    return work_seconds(work_of(launch, share), card)


def work_seconds(work: Work, card: Card) -> float:
    """Predict the time of work: the longest of memory, products and instructions, and the time to launch it."""
    memory = work.bytes / (card.gigabytes_per_second * 1e9 * BANDWIDTH)
    products = work.flops / rate(work, card) if work.flops else 0.0
    issue = work.instructions / (card.multiprocessors * card.gigahertz * 1e9 * INSTRUCTIONS * VECTOR)
    return work.launches * LAUNCH_SECONDS + max(memory, max(products, issue) * imbalance(work, card))


def work_of(launch: Launch, share: Share) -> Work:
    """Return the work of a recorded launch; `share` is that of `seconds`."""
    cost = launch_cost(launch, share)
    work = Work(launch.name, launch.launches, cost.bytes, cost.flops, cost.dtype)
    if launch.kernel is not None:
        programs = max(1, round(math.prod(launch.grid) * cost.running))
        return work._replace(
            programs=programs, tile=cost.tile, attention=cost.attention, instructions=instructions(launch, cost)
        )
    if launch.name in PRODUCTS:
        *batch, rows, columns = launch.result.shape
        return work._replace(rows=rows, columns=columns, results=math.prod(batch))
    if launch.name == "aten.convolution":
        images, channels, height, width = launch.result.shape
        return work._replace(rows=images * height * width, columns=channels)
    return work


def instructions(launch: Launch, cost: Cost) -> float:
    """Return the instructions that all threads of a Triton kernel run.

    The count is that of the cost table, or that of the machine code once a thread.
    """
    if cost.instructions:
        return cost.instructions
    threads = 32 * launch.kernel.num_warps * math.prod(launch.grid) * cost.running
    return resources(launch.kernel).instructions.total() * threads


def launch_cost(launch: Launch, share: Share) -> Cost:
    """Return what a launch moves and computes."""
    if launch.kernel is None:
        return Cost(launch.bytes, launch.flops, launch.dtype)
    return triton_cost(launch.name, launch.arguments, share)


def rate(work: Work, card: Card) -> float:
    """Return the FLOPs per second when every multiprocessor is busy."""
    convolves = work.name == "aten.convolution"
    if work.dtype == torch.float32 and not convolves:
        return card.fp32_tflops * 1e12 * VECTOR
    if convolves and work.dtype != torch.float32 and work.columns < 64:
        return FEW_OUTPUTS_TFLOPS * 1e12
    peak = card.bf16_tflops * 1e12
    if work.dtype in EIGHT_BITS:
        peak *= EIGHT_BITS[work.dtype][card.arch]
    if work.dtype == torch.float32:
        peak /= 2  # TF32, torch's default in convolutions
    if work.attention:
        return peak * ATTENTION[card.arch]
    return peak * card.cublas * (TRITON[card.arch] if work.programs else CONVOLUTION if convolves else 1)


def imbalance(work: Work, card: Card) -> float:
    """Return how many times longer products take than at the full rate.

    Programs come whole, the busiest multiprocessor decides, and small tiles are slower.
    """
    if work.programs:
        slower = 1 if work.tile is None else 1 / _tile_share(work.tile)
        return slower * _waves(work.programs, card)
    if not work.rows or (work.columns < 64 and work.name == "aten.convolution"):
        return 1.0

    def with_tile(tile: tuple[int, int]) -> float:
        tiles = math.ceil(work.rows / tile[0]) * math.ceil(work.columns / tile[1])
        padded = tiles * tile[0] * tile[1] / (work.rows * work.columns)
        return padded * _waves(work.results * tiles, card) / _tile_share(tile)

    return min(map(with_tile, LIBRARY_TILES))


def _tile_share(tile: tuple[int, int]) -> float:
    return next(share for elements, share in TILE_SHARES if tile[0] * tile[1] >= elements)


def _waves(programs: int, card: Card) -> float:
    return math.ceil(programs / card.multiprocessors) * card.multiprocessors / programs
