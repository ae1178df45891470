"""Predict the bits of Infinity along the images that the dense model draws, and measure the distance from dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actvar.baselines.replacing_methods import with_methods
from actvar.evaluate.divergence import token_divergence
from actvar.models.vqvae import without_decoder
from actvar.sampling.text_request import TextSampling
from actvar.utils.fingerprint import fingerprint


class ScaleBits(NamedTuple):
    """Hold what was drawn at one scale.

    Args:
        drawn: values of the bits, `[B, N]` int64.
        logits: logits of 0 and 1 that they were drawn from, after guidance and temperature, `[B, N, 2]`.
    """

    drawn: Tensor
    logits: Tensor


def drawn_bits(infinity: nn.Module, sampling: TextSampling) -> list[ScaleBits]:
    """Return what a model, dense or with a method on, draws at every scale; no image is decoded at the end.

    Args:
        infinity: an `actvar.models.Infinity`.
        sampling: the request, with features.
    """
    found: list[ScaleBits] = []
    own: Any = infinity
    draw_own = own.draw_bits

    def draw_bits(self, scale, logits, draw, rng):
        before = logits.clone()  # drawing may change them
        found.append(ScaleBits(draw_own(scale, logits, draw, rng), before))
        return found[-1].drawn

    with without_decoder(infinity, "decode"), with_methods(infinity, draw_bits=draw_bits):
        sampling.run(infinity)
    return found


def forced_logits(infinity: nn.Module, sampling: TextSampling, bits: Sequence[ScaleBits]) -> Iterator[Tensor]:
    """Yield the logits `[B, N, 2]` of every scale that a model predicts, where `bits` are drawn in place of its own.

    Args:
        infinity: an `actvar.models.Infinity`, dense or with a method on.
        sampling: the request, with features.
        bits: what is drawn at each scale.
    """
    found: list[Tensor] = []

    def draw_bits(self, scale, logits, draw, rng):
        found.append(logits)
        return bits[scale].drawn

    with without_decoder(infinity, "decode"), with_methods(infinity, draw_bits=draw_bits):
        sampling.run(infinity)
    yield from found


class DenseBits:
    """The bits that an unpatched model draws for some requests, and their logits, to compare others with.

    Args:
        infinity: the unpatched model.
        requests: what to draw, all with one schedule.
    """

    def __init__(self, infinity: nn.Module, requests: Sequence[TextSampling]):
        self.requests = requests
        self.bits = [drawn_bits(infinity, request) for request in requests]
        drawn = ((f"{i} {j}", scale.drawn) for i, bits in enumerate(self.bits) for j, scale in enumerate(bits))
        self.fingerprint = fingerprint(drawn)

    @torch.no_grad()
    def divergences(self, infinity: nn.Module) -> dict[str, list[float | None]]:
        """Return by `kl_drawn` `KL(dense || infinity)` in nats of the distributions that bits are drawn from.

        It is summed over the bits of a token, and is the mean over the tokens of each scale. A scale that `infinity`
        does not predict has None.

        Args:
            infinity: the model with a method on.
        """
        schedule = self.requests[0].schedule
        sums: list[float | None] = [None] * len(schedule)
        images = sum(len(request.labels) for request in self.requests)
        for request, bits in zip(self.requests, self.bits, strict=True):
            for scale, logits in enumerate(forced_logits(infinity, request, bits)):
                _, height, width = schedule[scale]
                total = token_divergence(bits[scale].logits, logits).sum().item()
                sums[scale] = total / (images * height * width) + (sums[scale] or 0.0)
        return {"kl_drawn": sums}
