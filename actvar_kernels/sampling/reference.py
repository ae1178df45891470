"""Guided top-k and top-p sampling in plain PyTorch: what the operation computes."""

from __future__ import annotations

import torch

# The nearest float32 numbers to 0 and 1 whose logarithm is finite and negative.
SMALLEST, LARGEST = 1e-10, 1 - 2**-24


def sample_tokens(
    logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float, noise: torch.Tensor
) -> torch.Tensor:
    """One token per position, the winner of `argmax(weight / e)`, `e = -log(noise)`; the lower index on a tie."""
    weights = token_weights(logits, guidance, top_k, top_p)
    return (weights / -noise.float().clamp(SMALLEST, LARGEST).log()).argmax(dim=-1)


def token_weights(logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float) -> torch.Tensor:
    """`[B, L, V]` float32: proportional to the probabilities, 0 where a token was filtered out."""
    guided = logits.float()
    if guidance is not None:
        cond, uncond = guided.chunk(2)
        guided = ((1 + guidance) * cond - guidance * uncond).masked_fill(cond == -torch.inf, -torch.inf)
    highest = guided.amax(dim=-1, keepdim=True)
    weights = (guided - highest).exp()
    if top_k > 0:
        weights = weights.masked_fill(guided < guided.topk(top_k, dim=-1).values[..., -1:], 0)
    if top_p > 0:
        ascending, order = guided.sort(dim=-1)
        mass = weights.gather(-1, order).cumsum(dim=-1)
        last_of_equals = torch.searchsorted(ascending, guided.contiguous(), right=True) - 1
        removed = mass.gather(-1, last_of_equals) <= (1 - top_p) * mass[..., -1:]
        weights = weights.masked_fill(removed & (guided < highest), 0)
    return weights


def uniform_noise(shape: tuple[int, ...], device: torch.device, seed: int, step: int) -> torch.Tensor:
    """Uniform float32 noise of a generator of its own; every `step` has another stream."""
    generator = torch.Generator(device).manual_seed((seed + step * 0x9E3779B97F4A7C15) % 2**63)
    return torch.rand(shape, generator=generator, device=device)
