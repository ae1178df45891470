"""The distance of a patched model's predictions from the dense model's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from actvar.config import DENSE
from actvar.families import family_of
from actvar.families.conditions import Batch
from actvar.patching.patch import patched_silently
from actvar.sparse.state import patch_state
from actvar.utils.wrappers import unwrapped


@torch.no_grad()
def divergence_by_scale(var: nn.Module, batches: Iterable[Batch]) -> list[float]:
    """Return `KL(dense || patched)` of the predicted tokens in nats, mean over the tokens of every scale.

    Both models read the same token maps under teacher forcing. The model stays patched.

    Args:
        var: a patched model in eval mode.
        batches: labels `[B]` int64 or texts, and inputs `[B, L - first_l, Cvae]`, see `VectorQuantizer.teacher_input`.

    Raises:
        ValueError: the model is not patched, or there is no batch.
    """
    patch_state(var)
    family, sizes, total, images = family_of(unwrapped(var)), [], torch.zeros((), dtype=torch.float64, device="cpu"), 0
    for conditions, inputs in batches:
        sizes = [height * width for height, width in family.maps_of(unwrapped(var), conditions)]
        patched = family.predicted(var, conditions, inputs)
        with patched_silently(var, DENSE, None):
            dense = family.predicted(var, conditions, inputs)
        token_sums = token_divergence(dense, patched).sum(dim=0)
        total = total + torch.stack([part.sum() for part in token_sums.split(sizes)]).double().cpu()
        images += len(conditions)
    if not images:
        raise ValueError("expected at least one batch")
    return [(sum_ / (images * size)).item() for sum_, size in zip(total, sizes, strict=True)]


def token_divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return `KL(softmax(expected) || softmax(logits))` in nats, `[R, L]` float32.

    Args:
        expected, logits: `[R, L, V]`; or `[R, L, bits, 2]`, where the divergences of a token's bits are added up.
    """
    expected, logits = expected.float().log_softmax(dim=-1), logits.float().log_softmax(dim=-1)
    divergences = (expected.exp() * (expected - logits)).sum(dim=-1)
    return divergences.sum(dim=-1) if divergences.ndim == 3 else divergences
