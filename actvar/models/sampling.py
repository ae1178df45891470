"""Drawing tokens from logits exactly as the public VAR code does, so that equal seeds give equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from actvar_kernels.sampling import cpu_public, public

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for the batch, one per image, or torch's global one."""


def generators(g_seed: int | Sequence[int] | None, B: int, device: torch.device) -> Randomness:
    """Generators of a seed for the batch, of `B` seeds, one per image, or None.

    Raises:
        ValueError: another number of seeds.
    """
    if g_seed is None:
        return None
    if not isinstance(g_seed, Sequence):
        return torch.Generator(device).manual_seed(g_seed)
    if len(g_seed) != B:
        raise ValueError(f"g_seed: expected an int, or one per image, {B} of them, got {len(g_seed)}")
    return [torch.Generator(device).manual_seed(seed) for seed in g_seed]


def sample_top_k_top_p(logits: torch.Tensor, top_k: int, top_p: float, rng: Randomness = None) -> torch.Tensor:
    """Draw one token per position.

    Args:
        logits: `[B, L, V]` float32; positions that are filtered out become -inf in place.
        top_k: keep the k largest logits (0: all).
        top_p: then keep the smallest set of tokens whose probability reaches p (0: all).
        rng: generator on the logits' device, one per image, or None for the global one.

    Returns:
        tokens `[B, L]` int64.
    """
    public.filter_(logits, top_k, top_p)
    probabilities = logits.softmax(dim=-1)
    if rng is None or isinstance(rng, torch.Generator):
        return public.draw(probabilities, rng)
    return public.draw_by_image(probabilities, rng)


def sample_guided(logits: torch.Tensor, guidance: float, top_k: int, top_p: float, rng: Randomness) -> torch.Tensor:
    """Tokens `[B, L]`, those of `sample_top_k_top_p` after guidance of logits `[2B, L, V]`, in C++ where that runs."""
    if not cpu_public.runs(logits):
        return sample_top_k_top_p(guided(logits, guidance), top_k, top_p, rng)
    filtered = cpu_public.guide_and_filter(logits, guidance, top_k, top_p)
    return by_image(cpu_public.draw, filtered.softmax(dim=-1), rng)


def guided(logits: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of logits `[2B, L, V]`, conditional half first: `(1 + t) * cond - t * uncond`; t is a
    number, or one for each token, `[L, 1]`."""
    conditional, unconditional = logits.float().chunk(2)
    return (1 + strength) * conditional - strength * unconditional


def gumbel_softmax(logits: torch.Tensor, temperature: float, rng: Randomness) -> torch.Tensor:
    """`softmax((logits + Gumbel noise) / temperature)` over the last axis, same shape as `logits`."""

    def gumbel(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return -torch.empty_like(like).exponential_(generator=generator).log()

    return ((logits + by_image(gumbel, logits, rng)) / temperature).softmax(dim=-1)


def by_image(
    random: Callable[[torch.Tensor, torch.Generator | None], torch.Tensor], of_images: torch.Tensor, rng: Randomness
) -> torch.Tensor:
    """`random(of_images, rng)`; with a generator per image, of each image `[1, ...]` alone, joined again."""
    if rng is None or isinstance(rng, torch.Generator):
        return random(of_images, rng)
    images = of_images.split(1)
    return torch.cat([random(image, generator) for image, generator in zip(images, rng, strict=True)])
