"""The filters and the draw of the public VAR code in plain PyTorch: what equal seeds' equal tokens are defined by."""

from __future__ import annotations

import torch


def filter_(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    """Logits `[..., V]` that the filters remove become -inf in place: all but the k largest (0: none), then all but the
    smallest set of tokens whose probability reaches p (0: none)."""
    if top_k > 0:
        threshold = logits.topk(top_k, largest=True, sorted=False, dim=-1)[0].amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False)
        remove = ascending.softmax(dim=-1).cumsum_(dim=-1) <= (1 - top_p)
        remove[..., -1:] = False
        logits.masked_fill_(remove.scatter(-1, order, remove), -torch.inf)


def draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One token `[...]` for each of the distributions `[..., V]`."""
    rows = probabilities.flatten(0, -2)
    tokens = torch.multinomial(rows, num_samples=1, replacement=True, generator=generator)
    return tokens.view(probabilities.shape[:-1])
