"""Drawing tokens from logits exactly as the public VAR code does, so that equal seeds give equal tokens."""

from __future__ import annotations

import torch


def sample_top_k_top_p(
    logits: torch.Tensor, top_k: int, top_p: float, rng: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one token per position.

    Args:
        logits: `[B, L, V]` float32; positions that are filtered out become -inf in place.
        top_k: keep the k largest logits (0: all).
        top_p: then keep the smallest set of tokens whose probability reaches p (0: all).
        rng: generator on the logits' device, or None for the global one.

    Returns:
        tokens `[B, L]` int64.
    """
    B, L, V = logits.shape
    if top_k > 0:
        threshold = logits.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= (1 - top_p)
        remove[..., -1:] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)
    probabilities = logits.softmax(dim=-1).view(-1, V)
    return torch.multinomial(probabilities, num_samples=1, replacement=True, generator=rng).view(B, L)


def gumbel_softmax(logits: torch.Tensor, temperature: float, rng: torch.Generator | None) -> torch.Tensor:
    """`softmax((logits + Gumbel noise) / temperature)` over the last axis, same shape as `logits`."""
    noise = -torch.empty_like(logits).exponential_(generator=rng).log()
    return ((logits + noise) / temperature).softmax(dim=-1)
