"""SkipVAR: late scales are left out, or drawn without the unconditional rows, as the details of each image allow.

Source: Li et al., SkipVAR: Accelerating Visual Autoregressive Modeling via Adaptive Frequency-Aware Skipping, 2025,
and its code, github.com/fakerone-li/SkipVAR at 607be0e: `infinity/models/infinity.py`.

Taken over: after the fourth scale from the end the image so far and the one before are decoded in a small size. How
their edges differ, and the share of high frequencies, decide by linear classifiers. One to three of the last scales are
left out. Otherwise the unconditional branch is replaced in as many: the conditional logits stand in its place, so
`cfg * text + (1 - cfg) * text` are the conditional logits alone. `public_decision` has the numbers of the authors'
classifiers for an SSIM of 0.84 (`decision_model_ssim_84`, logistic regression).

Adapted: scales are counted from the end, so that schedules of other lengths have them. The classifiers were fitted to
the 2B model with 13 scales, and mean nothing for other models. The conditional logits are drawn from without the
rounding of the sum above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.baselines.replacing_methods import with_methods
from actvar.config import DENSE
from actvar.models import Infinity
from actvar.models.infinity.tokenizer import resized
from actvar.patching.patch import patched_silently
from actvar.sparse.state import patch_state

DECIDED_AFTER = -4
"""The scale after which it is decided."""
HIGH_FREQUENCY = 0.4
"""Radius beyond which a frequency is high, in halves of the shorter side."""


class Choice(NamedTuple):
    """Hold what is saved of one image: how many of the last scales are left out, and how many are drawn unguided."""

    left_out: int
    unguided: int


class Classifier(NamedTuple):
    """Choose a class by the largest of some linear functions of two standardised numbers.

    Args:
        means, deviations: of the two numbers.
        weights: of the two numbers, for each class.
        biases: one for each class.
        first: the first class; the others follow.
    """

    means: tuple[float, float]
    deviations: tuple[float, float]
    weights: tuple[tuple[float, float], ...]
    biases: tuple[float, ...]
    first: int

    def of(self, numbers: Sequence[float]) -> int:
        """Return the class of two numbers."""
        x, y = ((n - m) / d for n, m, d in zip(numbers, self.means, self.deviations, strict=True))
        values = [a * x + b * y + bias for (a, b), bias in zip(self.weights, self.biases, strict=True)]
        return self.first + values.index(max(values))


LEFT_OUT = Classifier(
    (0.11532138615148142, 0.48923248731220764),
    (0.05764771612275109, 0.07561757563689318),
    (
        (1.9242725791534256, 1.7238401096226157),
        (0.960067473600445, 0.2971142070897517),
        (-0.05940983910118705, -0.5505044484622732),
        (-2.8249302136526855, -1.4704498682500922),
    ),
    (-0.8909667193946907, 0.7389152956922791, 0.8068347664885277, -0.6547833427861152),
    0,
)
UNGUIDED = Classifier(
    (0.17937917334093983, 0.5736133414885901),
    (0.06273303498221941, 0.05396232882731276),
    (
        (1.0163020533557818, 0.9910192939486673),
        (0.31731688877493053, -0.0029428785664912167),
        (-1.333618942130714, -0.9880764153821755),
    ),
    (-2.848019860692351, 0.4557509239689939, 2.392268936723362),
    1,
)


def public_decision(difference: float, share: float) -> Choice:
    """Return what the authors' classifiers choose.

    Args:
        difference: mean absolute difference of the edges of both images.
        share: share of high frequencies in the amplitudes of the later image.
    """
    left_out = LEFT_OUT.of((difference, share))
    return Choice(left_out, 0 if left_out else UNGUIDED.of((difference, share)))


@contextmanager
def skipvar(infinity: nn.Module, decide: Callable[[float, float], Choice] = public_decision) -> Iterator[nn.Module]:
    """Leave out late scales of an image, or their unconditional rows, as `decide` says of its details.

    Samples are of one image, since each has its own scales.

    Args:
        infinity: the dense model.
        decide: gets the numbers of `public_decision`, and chooses at most three of the last scales.

    Raises:
        TypeError: a model of another kind.
        ValueError: in sampling, for more than one image, or a schedule of less than five scales.
    """
    if not isinstance(infinity, Infinity):
        kind = type(infinity).__name__
        raise TypeError(f"infinity: expected actvar.models.Infinity (actvar.load_infinity makes one), got {kind}")

    def scales(self, schedule):
        if len(schedule) + DECIDED_AFTER < 1:
            raise ValueError(f"schedule: expected at least {1 - DECIDED_AFTER} scales for SkipVAR, got {len(schedule)}")
        _plan(self, Choice(0, 0))
        yield from type(self).scales(self, schedule)

    def add_scale(self, scale, features, bits):
        if len(features) != 1:
            raise ValueError(f"expected one image at a time, whose scales SkipVAR chooses, got {len(features)}")
        maps = self.actvar.maps
        if scale != len(maps) + DECIDED_AFTER:
            return type(self).add_scale(self, scale, features, bits)
        _, *size = self.tokenizer_schedule([(1, *maps[4 * len(maps) // 13])])[0]
        before = type(self).decode(self, resized(features, size))
        features = type(self).add_scale(self, scale, features, bits)
        after = type(self).decode(self, resized(features, size))
        difference = F.l1_loss(edges(after), edges(before)).item()
        _plan(self, decide(difference, high_frequencies(after).item()))
        return features

    with patched_silently(infinity, DENSE, None), with_methods(infinity, scales=scales, add_scale=add_scale):
        yield infinity


def _plan(infinity: Any, choice: Choice) -> None:
    """Plan the scales of the sample that runs, those that are drawn already as they were."""
    state, (left_out, unguided) = patch_state(infinity), choice
    maps = state.maps
    state.config = replace(DENSE, scales_until=-left_out or None, guidance_until=-unguided or None)
    state.maps = ()  # so that they are planned again
    state.fit_maps(infinity, maps)


def edges(images: torch.Tensor) -> torch.Tensor:
    """Return the strength of Sobel's edges of images `[B, C, H, W]`, `[B, 1, H, W]`, with zeros around the images."""
    grey = images.float().mean(dim=1, keepdim=True)
    across = grey.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    along = F.conv2d(grey, torch.stack((across, across.T))[:, None], padding=1)
    return along.square().sum(dim=1, keepdim=True).sqrt()


def high_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Return the share of high frequencies in the sum of all amplitudes of images `[B, C, H, W]`, `[B, 1]`."""
    amplitudes = torch.fft.fftshift(torch.fft.fft2(images.float().mean(dim=1, keepdim=True)), dim=(2, 3)).abs()
    height, width = amplitudes.shape[2:]
    down, right = (torch.arange(side, device=images.device) - side // 2 for side in (height, width))
    is_high = (down[:, None] ** 2 + right**2).sqrt() > int(HIGH_FREQUENCY * min(height, width) / 2)
    return (amplitudes * is_high).sum(dim=(2, 3)) / (amplitudes.sum(dim=(2, 3)) + 1e-6)
