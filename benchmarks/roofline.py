"""Predict the time of a kernel launch on a GPU, by a roofline with waves and a cost per launch.

Every constant of the model is in the tables below. Those of sm_90 and the bandwidth are measured on an H100 SXM, on the
operations of d16 at batch 64; the others are data sheets and assumptions.
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
# on A100 and B200 at their best shapes; 0.8 is assumed for the two Ada cards. H100: an FFN with 24,576 tokens.
CARDS = {
    "a100": Card(80, 312, 19.5, 2039, 108, 1.41, 40, cublas=0.869),
    "l40s": Card(89, 362, 91.6, 864, 142, 2.52, 96, cublas=0.8),
    "rtx4090": Card(89, 165, 82.6, 1008, 128, 2.52, 72, cublas=0.8),
    "h100": Card(90, 989, 66.9, 3350, 132, 1.98, 50, cublas=0.73),
    "b200": Card(100, 2250, 75, 8000, 148, 1.98, 126, cublas=0.776),
}

LAUNCH_SECONDS = 1.2e-6  # from one kernel to the next in a CUDA graph; design assumption
BANDWIDTH = 0.8  # share of the data sheet's: LayerNorm with modulation on an H100
# Of cuBLAS; on the H100 the experts' two products, all blocks run.
TRITON = {80: 0.88, 86: 0.88, 89: 0.88, 90: 0.84, 100: 0.88, 120: 0.88}
# Share of the peak in attention with head size 64, on the H100 of 192 queries over 574 keys. FlashAttention-2 reaches
# about 0.55 on A100 (Dao 2023); 0.25 on B200 is assumed.
ATTENTION = {80: 0.55, 86: 0.55, 89: 0.55, 90: 0.23, 100: 0.25, 120: 0.55}
VECTOR = 0.7  # share of the fp32 rate, and of the instructions that could be issued, without tensor cores; assumed
INSTRUCTIONS = 4 * 32  # of threads per cycle and multiprocessor: four schedulers, a warp each
# Of these cuBLAS is given the best; assumed.
CUBLAS_TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 64))
# Share of the rate that products with tiles of at least so many elements reach, cuBLAS or Triton; assumed.
TILE_SHARES = ((128 * 128, 1.0), (64 * 128, 0.8), (0, 0.6))


def seconds(launch: Launch, card: Card, share: Share) -> float:
    """Predict the time of one launch: the longest of memory, products and instructions, and the time to launch it.

    Args:
        share: see `actvar_kernels.tools.virtual.cost`.
    """
    cost = launch_cost(launch, share)
    memory = cost.bytes / (card.gigabytes_per_second * 1e9 * BANDWIDTH)
    products = cost.flops / rate(launch, cost, card) if cost.flops else 0.0
    issue = instructions(launch, cost) / (card.multiprocessors * card.gigahertz * 1e9 * INSTRUCTIONS * VECTOR)
    return launch.launches * LAUNCH_SECONDS + max(memory, max(products, issue) * imbalance(launch, cost, card))


def instructions(launch: Launch, cost: Cost) -> float:
    """Return the instructions that all threads of a Triton kernel run.

    The count is that of the cost table, or that of the machine code once a thread.
    """
    if launch.kernel is None or cost.instructions:
        return cost.instructions
    threads = 32 * launch.kernel.num_warps * math.prod(launch.grid) * cost.running
    return resources(launch.kernel.cubin).instructions.total() * threads


def launch_cost(launch: Launch, share: Share) -> Cost:
    """Return what a launch moves and computes."""
    if launch.kernel is None:
        return Cost(launch.bytes, launch.flops, launch.dtype)
    return triton_cost(launch.name, launch.arguments, share)


def rate(launch: Launch, cost: Cost, card: Card) -> float:
    """Return the FLOPs per second when every multiprocessor is busy."""
    if cost.dtype == torch.float32 and launch.name == "aten.convolution":
        return card.bf16_tflops * 1e12 / 2 * card.cublas  # TF32, torch's default in convolutions
    if cost.dtype == torch.float32:
        return card.fp32_tflops * 1e12 * VECTOR
    peak = card.bf16_tflops * 1e12
    if cost.attention:
        return peak * ATTENTION[card.arch]
    return peak * card.cublas * (1 if launch.kernel is None else TRITON[card.arch])


def imbalance(launch: Launch, cost: Cost, card: Card) -> float:
    """Return how many times longer products take than at the full rate.

    Programs come whole, the busiest multiprocessor decides, and small tiles are slower.
    """
    if launch.kernel is not None:
        slower = 1 if cost.tile is None else 1 / _tile_share(cost.tile)
        return slower * _waves(max(1, round(math.prod(launch.grid) * cost.running)), card)
    if launch.name not in ("aten.mm", "aten.addmm", "aten.bmm", "aten._addmm_activation"):
        return 1.0
    *batch, rows, columns = launch.result.shape

    def with_tile(tile: tuple[int, int]) -> float:
        tiles = math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
        padded = tiles * tile[0] * tile[1] / (rows * columns)
        return padded * _waves(math.prod(batch) * tiles, card) / _tile_share(tile)

    return min(map(with_tile, CUBLAS_TILES))


def _tile_share(tile: tuple[int, int]) -> float:
    return next(share for elements, share in TILE_SHARES if tile[0] * tile[1] >= elements)


def _waves(programs: int, card: Card) -> float:
    return math.ceil(programs / card.multiprocessors) * card.multiprocessors / programs
