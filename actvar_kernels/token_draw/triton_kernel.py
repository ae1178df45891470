"""Run guidance, top-k, top-p and the draw as one Triton launch, one position per program.

Both filters keep the logits from some threshold on. Passes over the logits, which stay in registers, search for the
threshold (`docs/kernels/token_draw.md`). The threshold that is found is exact. How many passes it takes depends on the
logits (`python -m benchmarks.sampler_passes`).
"""

# A launch takes options that the kernel does not name; Triton's own functions have no results outside a kernel.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from statistics import NormalDist

import torch
import triton
import triton.language as tl

from actvar_kernels.token_draw.reference import LARGEST, SMALLEST
from actvar_kernels.triton_backend.tiles import architecture, most_registers, next_power_of_2, sampling_warps


def sample_tokens(
    logits: torch.Tensor,
    guidance: float | None,
    top_k: int,
    top_p: float,
    seed: int | torch.Tensor,
    step: int,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Return the tokens `[B, L]` int64 that the operation draws.

    Args:
        logits: `[2B, L, V]`, or `[B, L, V]` without guidance, floating-point, any strides.
        guidance: strength of classifier-free guidance, or None.
        top_k: 0 ... V; 0 keeps all.
        top_p: 0 ... 1; 0 keeps all.
        seed: number, or an int64 tensor with one element, or with one per image.
        step: number of the stream.
        noise: `[B, L, V]`, floating-point, any strides, instead of a seed; or None.
    """
    rows, L, V = logits.shape
    images = rows if guidance is None else rows // 2
    tokens = logits.new_empty(images, L, dtype=torch.int64)
    block = max(4, next_power_of_2(V))
    share = min(max(top_k / V, 0.5 / V), 1 - 0.5 / V)
    quantile = NormalDist().inv_cdf(1 - share)
    by_image = isinstance(seed, torch.Tensor) and seed.numel() > 1
    # the compiler would spill to let one more program share a multiprocessor
    registers = most_registers(168 if by_image and architecture(logits) in (100, 120) else None)
    _sample[(tokens.numel(),)](
        logits,
        noise,
        tokens,
        seed,
        logits.stride(),
        None if noise is None else noise.stride(),
        images,
        L,
        V,
        1 + (guidance or 0.0),
        guidance or 0.0,
        top_k,
        quantile,
        1 / (V * NormalDist().pdf(quantile)),
        1 - top_p,
        step,
        BY_IMAGE=by_image,
        GUIDED=guidance is not None,
        TOP_K=top_k > 0,
        TOP_P=top_p > 0,
        SMALLEST=SMALLEST,
        LARGEST=LARGEST,
        BLOCK=block,
        num_warps=sampling_warps(block),
        enable_fp_fusion=True,
        **registers,
    )
    return tokens


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=[
        "seed",
        "images",
        "positions",
        "cond_factor",
        "uncond_factor",
        "top_k",
        "quantile",
        "slope",
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
    quantile,
    slope,
    tail,
    step,
    BY_IMAGE: tl.constexpr,
    GUIDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the token of one position.

    `tail` is 1 - top_p. `seed` is a number or a pointer to one, with `BY_IMAGE` to one per image. `quantile` and
    `slope` say where normally distributed logits have their `top_k`-th highest: `quantile` deviations above the mean.
    One rank more or less is `slope` deviations.
    """
    row = tl.program_id(0)
    image, position = (row // positions).to(tl.int64), row % positions
    token = tl.arange(0, BLOCK)
    real = token < vocabulary

    cond_ptr = logits_ptr + image * logits_strides[0] + position * logits_strides[1]
    guided = tl.load(cond_ptr + token * logits_strides[2], mask=real, other=-float("inf")).to(tl.float32)
    if GUIDED:
        uncond_ptr = cond_ptr + images.to(tl.int64) * logits_strides[0]
        uncond = tl.load(uncond_ptr + token * logits_strides[2], mask=real, other=0.0).to(tl.float32)
        cond = guided
        guided = tl.where(cond == -float("inf"), -float("inf"), cond_factor * cond - uncond_factor * uncond)
    highest = tl.max(guided, axis=0)

    if TOP_K:
        threshold = _top_k_threshold(guided, highest, vocabulary, top_k, quantile, slope)
    else:
        threshold = tl.min(tl.where(guided > -float("inf"), guided, highest), axis=0)
    if TOP_P:
        threshold = _top_p_threshold(guided, highest, threshold, tail)

    if noise_ptr is None:
        if BY_IMAGE:
            uniform = tl.maximum(_uniform(tl.load(seed + image), position, step, BLOCK), SMALLEST)
        else:
            if seed.dtype.is_ptr():
                seed = tl.load(seed)
            uniform = tl.maximum(_uniform(seed, row, step, BLOCK), SMALLEST)
    else:
        noise_ptr += image * noise_strides[0] + position * noise_strides[1]
        uniform = tl.load(noise_ptr + token * noise_strides[2], mask=real, other=0.5).to(tl.float32)
        uniform = tl.minimum(tl.maximum(uniform, SMALLEST), LARGEST)
    # argmax(p / e) as argmin(e / p)
    race = -tl.log2(uniform) * tl.exp2((highest - guided) * _LOG2_E)
    tl.store(tokens_ptr + row, tl.argmin(tl.where(guided >= threshold, race, float("inf")), axis=0))


@triton.jit
def _top_k_threshold(x, highest, count, k, quantile, slope):
    """Return a number that the k highest of `x` reach, and those equal to the lowest of them, and no others.

    Where not more than k are finite, this is the lowest finite number. `count` numbers of `x` are no padding.
    """
    finite = x > -float("inf")
    below = tl.where(finite, x - highest, 0.0)
    mean = tl.sum(below, axis=0) / count
    deviation = tl.sqrt(tl.maximum(tl.sum(below * below, axis=0) / count - mean * mean, 0.0))

    low = tl.min(tl.where(finite, x, highest), axis=0)  # at least k reach it, as far as there are so many
    reach_low = count
    high = highest + 0.01 * (highest - low)  # fewer than k reach it
    reach_high = 0
    trial = highest + mean + quantile * deviation
    passes = 0
    searching = reach_low > k
    while searching:
        trial = tl.where((low < trial) & (trial < high), trial, 0.5 * low + 0.5 * high)
        if (low < trial) & (trial < high):
            reach = _reaching(x, trial)
            passes += 1
            low = tl.where(reach >= k, trial, low)
            reach_low = tl.where(reach >= k, reach, reach_low)
            high = tl.where(reach >= k, high, trial)
            reach_high = tl.where(reach >= k, reach_high, reach)
            if (reach_low != k) & ((reach_low - reach_high <= 8) | (passes % 8 == 0)):
                # few are left between the bounds: look at the lowest of them
                lowest, next_lowest, reach = _step_up(x, low)
                low = tl.where(reach >= k, next_lowest, lowest)
                reach_low = tl.where(reach >= k, reach, k)  # where fewer are above it, it is the one
            searching = reach_low != k
            if passes == 1:
                trial += (reach - k).to(tl.float32) * slope * deviation
            elif passes % 4 == 3:
                trial = 0.5 * low + 0.5 * high
            else:
                trial = low + (high - low) * (reach_low - k + 0.5) / (reach_low - reach_high)
        else:
            searching = False  # no number lies between the bounds: those from the lower one on are equal to it
    return low


@triton.jit
def _top_p_threshold(x, highest, threshold, tail):
    """Return a number that exactly those of `x` reach which top-p keeps.

    Numbers from the finite `threshold` on are weighed by `exp(x)`. The lowest ones go that together have no more than
    `tail` of the weight. Equal ones go together, and the highest never go.
    """
    weights = tl.where(x >= threshold, tl.exp2((x - highest) * _LOG2_E), 0.0)
    total = tl.sum(weights, axis=0)
    removable = tail * total
    low = threshold  # no more than `removable` below
    mass_low = 0.0
    high, mass_high = highest, total  # more below, or the highest
    passes = 0
    # whatever is lowest from `low` on has at least this weight
    searching = mass_low + tl.exp2((low - highest) * _LOG2_E) <= removable
    while searching:
        middle = 0.5 * low + 0.5 * high
        trial = middle
        if passes % 3 == 1:
            trial = low + (high - low) * (removable - mass_low) / (mass_high - mass_low)
        elif (passes % 3 == 2) & (mass_low > 0):
            base = tl.log2(mass_low)
            trial = low + (high - low) * (tl.log2(removable) - base) / (tl.log2(mass_high) - base)
        trial = tl.where((low < trial) & (trial < high), trial, middle)
        if (low < trial) & (trial < high):
            mass = _mass_below(x, weights, trial)
            passes += 1
            mass_high = tl.where(mass <= removable, mass_high, mass)
            high = tl.where(mass <= removable, high, trial)
            mass_low = tl.where(mass <= removable, mass, mass_low)
            low = tl.where(mass <= removable, trial, low)
            searching = mass_low + tl.exp2((low - highest) * _LOG2_E) <= removable
            if searching & (passes % 4 == 0):
                low = tl.min(tl.where(x >= low, x, float("inf")), axis=0)
                mass = tl.sum(tl.where(x > low, 0.0, weights), axis=0)
                searching = mass <= removable
                if searching:
                    low = tl.min(tl.where(x > low, x, float("inf")), axis=0)
                    mass_low = mass
        else:
            searching = False
    return tl.minimum(low, highest)


@triton.jit
def _reaching(x, trial):
    """Return how many of `x` are `trial` or higher."""
    return tl.sum((x >= trial).to(tl.int32), axis=0)


@triton.jit
def _mass_below(x, weights, trial):
    """Return the weight of those of `x` that are lower than `trial`."""
    return tl.sum(tl.where(x < trial, weights, 0.0), axis=0)


@triton.jit
def _step_up(x, low):
    """Return the lowest of `x` from `low` on, the next one that differs, and how many are higher than the first."""
    lowest = tl.min(tl.where(x >= low, x, float("inf")), axis=0)
    higher = x > lowest
    return lowest, tl.min(tl.where(higher, x, float("inf")), axis=0), tl.sum(higher.to(tl.int32), axis=0)


@triton.jit
def _uniform(seed, row, step, BLOCK: tl.constexpr):
    """Return `[BLOCK]` float32 in [0, 1 - 2^-24].

    Four neighbours are the four outputs of one counter.
    """
    first, second, third, fourth = tl.philox(seed, tl.arange(0, BLOCK // 4), row, step, 0)
    bits = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.uint_to_uniform_float(tl.reshape(bits, (BLOCK,)))
