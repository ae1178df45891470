"""Draw tokens from logits exactly as the public VAR code does, so that equal seeds give equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from actvar_kernels import sample_tokens
from actvar_kernels.token_draw import cpu_public, public

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""Generators of noise: one for the batch, one per image, or None for torch's global one."""


def generators(g_seed: int | Sequence[int] | None, B: int, device: torch.device) -> Randomness:
    """Return the generators of `g_seed`, which are None without a seed.

    Args:
        g_seed: one seed for the batch, a sequence with one per image, or None.
        B: number of images.
        device: device of the generators.

    Raises:
        ValueError: a sequence of another length than `B`.
    """
    if g_seed is None:
        return None
    if not isinstance(g_seed, Sequence):
        return torch.Generator(device).manual_seed(g_seed)
    _expect_one_per_image(g_seed, B)
    return [torch.Generator(device).manual_seed(seed) for seed in g_seed]


def seed_tensor(g_seed: int | Sequence[int] | None, B: int, device: torch.device) -> torch.Tensor:
    """Return seeds for `actvar_kernels.sample_tokens`, `[1]` or with one per image `[B]` int64, modulo 2^64.

    Without a seed torch's global generator draws one.

    Args:
        g_seed, B: as in `generators`.
        device: device of the tensor.

    Raises:
        ValueError: a sequence of another length than `B`.
    """
    if g_seed is None:
        return torch.randint(2**62, (1,), device=device)
    seeds = g_seed if isinstance(g_seed, Sequence) else (g_seed,)
    if seeds is g_seed:
        _expect_one_per_image(seeds, B)
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], dtype=torch.int64, device=device)


def seeds_of(rng: Randomness) -> int | tuple[int, ...] | None:
    """Return the seeds of generators; None for torch's global one."""
    if rng is None or isinstance(rng, torch.Generator):
        return None if rng is None else rng.initial_seed()
    return tuple(generator.initial_seed() for generator in rng)


def fast_draw(
    logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float, rng: Randomness, scale: int
) -> torch.Tensor:
    """Draw tokens `[B, L]` int64 in one kernel, by the seeds of `rng`; arguments are those of `VAR.draw`.

    Guidance is None for logits `[B, L, V]` that have it already.
    """
    images = len(logits) if guidance is None else len(logits) // 2
    seeds = seed_tensor(seeds_of(rng), images, logits.device)
    return sample_tokens(logits, guidance, top_k, top_p, seed=seeds, step=scale)


def _expect_one_per_image(seeds: Sequence[int], B: int) -> None:
    """Raise a ValueError unless there are `B` seeds."""
    if len(seeds) != B:
        raise ValueError(f"g_seed: expected an int, or one per image, {B} of them, got {len(seeds)}")


def sample_top_k_top_p(logits: torch.Tensor, top_k: int, top_p: float, rng: Randomness = None) -> torch.Tensor:
    """Draw one token per position.

    Args:
        logits: `[B, L, V]` float32; tokens that are filtered out become -inf in place.
        top_k: number of the largest logits to keep; 0 keeps all.
        top_p: probability that the smallest set of tokens to keep reaches, after `top_k`; 0 keeps all.
        rng: generator on the logits' device, one per image, or None for the global one.

    Returns:
        tokens `[B, L]` int64.
    """
    public.filter_(logits, top_k, top_p)
    probabilities = logits.softmax(dim=-1)
    if rng is None or isinstance(rng, torch.Generator):
        return public.draw(probabilities, rng)
    return public.draw_by_image(probabilities, rng)


def sample_guided(
    logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float, rng: Randomness
) -> torch.Tensor:
    """Draw tokens `[B, L]` int64 as `sample_top_k_top_p` does, after guidance, in C++ where C++ runs.

    Args:
        logits: `[2B, L, V]`, the conditional half first; without guidance `[B, L, V]`.
        guidance: strength t, as in `guided`; None for none.
        top_k, top_p, rng: as in `sample_top_k_top_p`.
    """
    runs = cpu_public.runs(logits)
    if guidance is None:
        if not runs:
            return sample_top_k_top_p(logits.float(), top_k, top_p, rng)
        if not top_k and not top_p:
            return by_image(cpu_public.draw, logits.float().softmax(dim=-1), rng)
        logits, guidance = torch.cat((logits, logits)), 0.0
    if not runs:
        return sample_top_k_top_p(guided(logits, guidance), top_k, top_p, rng)
    filtered = cpu_public.guide_and_filter(logits, guidance, top_k, top_p)
    return by_image(cpu_public.draw, filtered.softmax(dim=-1), rng)


def guided(logits: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Return logits `[B, L, V]` float32 after classifier-free guidance: `(1 + t) * cond - t * uncond`.

    Args:
        logits: `[2B, L, V]`, the conditional half first.
        strength: t as a number, or as one for each token, `[L, 1]`.
    """
    conditional, unconditional = logits.float().chunk(2)
    return (1 + strength) * conditional - strength * unconditional


def gumbel_softmax(logits: torch.Tensor, temperature: float, rng: Randomness) -> torch.Tensor:
    """Return `softmax((logits + Gumbel noise) / temperature)` over the last axis, in the shape of `logits`."""

    def gumbel(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return -torch.empty_like(like).exponential_(generator=generator).log()

    return ((logits + by_image(gumbel, logits, rng)) / temperature).softmax(dim=-1)


def by_image(
    random: Callable[[torch.Tensor, torch.Generator | None], torch.Tensor], batch: torch.Tensor, rng: Randomness
) -> torch.Tensor:
    """Return `random(batch, rng)`, or with a generator per image the joined results of each image alone.

    Args:
        random: a function of a tensor `[b, ...]` and a generator.
        batch: `[B, ...]`, one entry per image.
        rng: one generator, one per image, or None for the global one.
    """
    if rng is None or isinstance(rng, torch.Generator):
        return random(batch, rng)
    images = batch.split(1)
    return torch.cat([random(image, generator) for image, generator in zip(images, rng, strict=True)])
