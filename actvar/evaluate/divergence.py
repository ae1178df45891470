"""The distance of a patched model's predictions from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from actvar.config import DENSE
from actvar.patching.patch import patched_silently
from actvar.sparse.state import patch_state


@torch.no_grad()
def divergence_by_scale(var: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Return `KL(dense || patched)` of the predicted tokens in nats, mean over the tokens of every scale.

    Both models read the same token maps under teacher forcing. The model stays patched.

    Args:
        var: a patched model in eval mode.
        batches: labels `[B]` int64 and inputs `[B, L - first_l, Cvae]`, see `VectorQuantizer.teacher_input`.

    Raises:
        ValueError: the model is not patched, or there is no batch.
    """
    sizes = [scale.tokens for scale in patch_state(var).schedule]
    total, images = torch.zeros(len(sizes), dtype=torch.float64, device="cpu"), 0
    for labels, inputs in batches:
        patched = var(labels, inputs)
        with patched_silently(var, DENSE, None):
            dense = var(labels, inputs)
        token_sums = token_divergence(dense, patched).sum(dim=0)
        total += torch.stack([part.sum() for part in token_sums.split(sizes)]).double().cpu()
        images += len(labels)
    if not images:
        raise ValueError("expected at least one batch")
    return [(sum_ / (images * size)).item() for sum_, size in zip(total, sizes, strict=True)]


def token_divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return `KL(softmax(expected) || softmax(logits))` in nats, `[...]` float32 of two tensors `[..., V]`."""
    expected, logits = expected.float().log_softmax(dim=-1), logits.float().log_softmax(dim=-1)
    return (expected.exp() * (expected - logits)).sum(dim=-1)
