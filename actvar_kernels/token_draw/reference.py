"""Define guided top-k and top-p sampling in plain PyTorch."""

from __future__ import annotations

import torch

# The nearest float32 numbers to 0 and 1 whose logarithm is finite and negative.
SMALLEST, LARGEST = 1e-10, 1 - 2**-24


def sample_tokens(
    logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float, noise: torch.Tensor
) -> torch.Tensor:
    """Return one token per position, the winner of `argmax(weight / e)` with `e = -log(noise)`.

    The lower index wins a tie.
    """
    weights = token_weights(logits, guidance, top_k, top_p)
    return (weights / -noise.float().clamp(SMALLEST, LARGEST).log()).argmax(dim=-1)


def token_weights(logits: torch.Tensor, guidance: float | None, top_k: int, top_p: float) -> torch.Tensor:
    """Return weights `[B, L, V]` float32 in proportion to the probabilities, 0 where a token was filtered out."""
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


def uniform_noise(shape: tuple[int, int, int], device: torch.device, seed: int, step: int) -> torch.Tensor:
    """Return numbers `[B, L, V]` float32 in [0, 1 - 2^-24], made as `op.sample_tokens` says.

    The generator is Philox 4x32-10 (Salmon et al. 2011).
    """
    B, L, V = shape
    rows, groups = torch.arange(B * L, device=device).unsqueeze(1), torch.arange(-(-V // 4), device=device)
    a, b, c, d = torch.broadcast_tensors(groups, rows, torch.full_like(groups, step % 2**32), torch.zeros_like(groups))
    keys = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(10):
        (high, low), (other_high, other_low) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = other_high ^ b ^ keys[0], other_low, high ^ d ^ keys[1], low
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    bits = torch.stack((a, b, c, d), dim=-1).flatten(1)[:, :V].to(torch.int32)
    return ((bits ^ (bits >> 31)).float() * 4.6566127342e-10).view(shape)


def _product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return upper and lower 32 bits of `x * factor`, all unsigned numbers of 32 bits in int64."""
    upper = ((x >> 16) * factor + ((x & 0xFFFF) * factor >> 16)) >> 16
    return upper, x * factor & 0xFFFFFFFF
