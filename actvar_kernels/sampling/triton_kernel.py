"""Guidance, top-k, top-p and the draw as one Triton launch, one position per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.sampling.reference import LARGEST, SMALLEST
from actvar_kernels.tiles import sampling_warps


def sample_tokens(
    logits: torch.Tensor,
    guidance: float,
    top_k: int,
    top_p: float,
    seed: int | torch.Tensor,
    step: int,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """As the operation: `logits` `[2B, L, V]`, `noise` `[B, L, V]` or None, any strides; returns `[B, L]` int64."""
    rows, L, V = logits.shape
    tokens = logits.new_empty(rows // 2, L, dtype=torch.int64)
    block = max(4, triton.next_power_of_2(V))
    _sample[(tokens.numel(),)](
        logits,
        noise,
        tokens,
        seed,
        logits.stride(),
        None if noise is None else noise.stride(),
        rows // 2,
        L,
        V,
        1 + guidance,
        guidance,
        top_k,
        1 - top_p,
        step,
        TOP_K=top_k > 0,
        TOP_P=top_p > 0,
        SMALLEST=SMALLEST,
        LARGEST=LARGEST,
        BLOCK=block,
        num_warps=sampling_warps(block),
    )
    return tokens


@triton.jit(
    do_not_specialize=[
        "seed",
        "images",
        "positions",
        "vocabulary",
        "cond_factor",
        "uncond_factor",
        "top_k",
        "tail",
        "step",
    ]
)
def _sample(
    logits_ptr,
    noise_ptr,
    tokens_ptr,
    seed,
    logits_strides,
    noise_strides,
    images,
    positions,
    vocabulary,
    cond_factor,
    uncond_factor,
    top_k,
    tail,
    step,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of one position; `tail` is 1 - top_p, and `seed` a number or a pointer to one."""
    row = tl.program_id(0)
    image, position = (row // positions).to(tl.int64), row % positions
    token = tl.arange(0, BLOCK)
    real = token < vocabulary

    cond_ptr = logits_ptr + image * logits_strides[0] + position * logits_strides[1]
    uncond_ptr = cond_ptr + images.to(tl.int64) * logits_strides[0]
    cond = tl.load(cond_ptr + token * logits_strides[2], mask=real, other=-float("inf")).to(tl.float32)
    uncond = tl.load(uncond_ptr + token * logits_strides[2], mask=real, other=0.0).to(tl.float32)
    guided = cond_factor * cond - uncond_factor * uncond
    guided = tl.where(cond == -float("inf"), -float("inf"), guided)
    weights = tl.exp(guided - tl.max(guided, axis=0))
    key = _ordered(guided)

    if TOP_K:
        threshold, bit = _bisection_start()
        kept = vocabulary
        while (bit != 0) & (kept != top_k):
            trial = threshold | bit
            reached = tl.sum((key >= trial).to(tl.int32), axis=0)
            threshold = tl.where(reached >= top_k, trial, threshold)
            kept = tl.where(reached >= top_k, reached, kept)
            bit = bit >> 1
        weights = tl.where(key >= threshold, weights, 0.0)
    if TOP_P:
        removable = tail * tl.sum(weights, axis=0)
        threshold, bit = _bisection_start()
        for _ in range(32):
            trial = threshold | bit
            removed = tl.sum(tl.where(key < trial, weights, 0.0), axis=0)
            threshold = tl.where(removed <= removable, trial, threshold)
            bit = bit >> 1
        threshold = tl.minimum(threshold, tl.max(key, axis=0))
        weights = tl.where(key >= threshold, weights, 0.0)

    if noise_ptr is None:
        if seed.dtype.is_ptr():
            seed = tl.load(seed)
        uniform = _uniform(seed, row, step, BLOCK)
    else:
        noise_ptr += image * noise_strides[0] + position * noise_strides[1]
        uniform = tl.load(noise_ptr + token * noise_strides[2], mask=real, other=0.5).to(tl.float32)
    uniform = tl.minimum(tl.maximum(uniform, SMALLEST), LARGEST)
    tl.store(tokens_ptr + row, tl.argmax(weights / -tl.log(uniform), axis=0))


@triton.jit
def _uniform(seed, row, step, BLOCK: tl.constexpr):
    """`[BLOCK]` float32 in [0, 1): four neighbours are the four outputs of one counter."""
    first, second, third, fourth = tl.philox(seed, tl.arange(0, BLOCK // 4), row, step, 0)
    bits = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.uint_to_uniform_float(tl.reshape(bits, (BLOCK,)))


@triton.jit
def _ordered(x):
    """Unsigned integers in the order of the float32 numbers `x`; equal for 0 and -0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 0, 0x80000000, 0xFFFFFFFF)


@triton.jit
def _bisection_start():
    """Threshold and highest bit of a search, bit by bit, for the largest `trial` of which a condition holds."""
    return tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
