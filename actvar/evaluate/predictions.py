"""Predictions of a model scale by scale on given token maps, as in sampling, and their distance from dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import nn

from actvar.evaluate.divergence import token_divergence
from actvar.families import family_of
from actvar.families.conditions import Batch, Conditions, features_of
from actvar.models.token_draw import guided
from actvar.sparse.state import is_patched, patch_state
from actvar.utils.fingerprint import fingerprint


@torch.no_grad()
def predictions(
    var: nn.Module, conditions: Conditions, inputs: torch.Tensor, cfg: float | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of each scale that is sampled with its logits `[R, L, V]`, or `[R, L, bits, 2]` of bits.

    Rows are `B` conditional ones, then as many unconditional ones, unless the method in use has dropped these. The
    inputs are fed scale by scale, through the K/V cache, so that every change of sampling takes effect.

    Args:
        var: dense, or with a method on.
        conditions: of `B` images.
        inputs: `[B, L - first_l, Cvae]`.
        cfg: guidance strength that an adapter's weights are brought to; None for the adapter's own.
    """
    with ExitStack() as stack:
        if is_patched(var):
            state = patch_state(var)
            stack.enter_context(state.sampling(var, in_place=False))
            if cfg is not None:
                stack.enter_context(state.strengths.running(var, cfg))
        yield from family_of(var).scale_logits(var, conditions, inputs)


class DensePredictions:
    """The logits of an unpatched model, kept to compare others with.

    Args:
        var: the unpatched model.
        batches: the token maps.
        cfg: guidance strength of the drawn tokens.
    """

    def __init__(self, var: nn.Module, batches: Sequence[Batch], cfg: float):
        self.batches, self.cfg = batches, cfg
        tensors = ((str(i), tensor) for i, (of, inputs) in enumerate(batches) for tensor in (features_of(of), inputs))
        self.fingerprint = fingerprint(tensors)
        self.family = family_of(var)
        self.logits = [[logits for _, logits in predictions(var, *batch)] for batch in batches]

    @torch.no_grad()
    def divergences_without_guidance(self) -> list[float]:
        """Return `KL(guided || conditional)` of the model's own logits in nats, mean over the tokens of each scale."""
        return self._means(lambda rows, count, strength: (guided(rows, strength), rows[:count]))

    def _means(self, pair_of: Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Return the mean divergence of each scale between two logits.

        Args:
            pair_of: makes both from the logits of all rows, the number of conditional rows, and the guidance strength.
        """
        count_of_scales, images = len(self.logits[0]), sum(len(of) for of, _ in self.batches)
        sums = [0.0] * count_of_scales
        for logits in self.logits:
            for scale, rows in enumerate(logits):
                count = len(rows) // 2
                pair = pair_of(rows, count, self.family.strength(self.cfg, scale, count_of_scales))
                sums[scale] += token_divergence(*pair).mean().item() * count / images
        return sums

    @cached_property
    @torch.no_grad()
    def divergences_from_uniform(self) -> list[float]:
        """Return `KL(guided || uniform)` of the model's own logits in nats, mean over the tokens of each scale.

        It is what a scale counts at which nothing is predicted.
        """
        return self._means(lambda rows, count, strength: (drawn := guided(rows, strength), torch.zeros_like(drawn)))

    @torch.no_grad()
    def divergences(self, var: nn.Module) -> dict[str, list[float | None]]:
        """Return `KL(dense || var)` in nats, mean over the tokens of each scale.

        A scale that `var` does not predict has None.

        Args:
            var: the model with a method on.

        Returns:
            `kl` of the conditional rows, and `kl_drawn` of the distributions that tokens are drawn from, with guidance
            where `var` has it.
        """
        count_of_scales, images = len(self.logits[0]), sum(len(of) for of, _ in self.batches)
        sums: dict[str, list[float | None]] = {name: [None] * count_of_scales for name in ("kl", "kl_drawn")}
        for (of, inputs), dense_logits in zip(self.batches, self.logits, strict=True):
            for scale, logits in predictions(var, of, inputs, self.cfg):
                count, strength = len(of), self.family.strength(self.cfg, scale, count_of_scales)
                dense = dense_logits[scale]
                drawn = guided(logits, strength) if len(logits) == 2 * count else logits
                pairs = {"kl": (dense[:count], logits[:count]), "kl_drawn": (guided(dense, strength), drawn)}
                for name, pair in pairs.items():
                    mean = token_divergence(*pair).mean().item() * count / images
                    sums[name][scale] = mean + (sums[name][scale] or 0.0)
        return sums
