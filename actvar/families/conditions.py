"""Hold what a batch of images is drawn from: classes, or texts with the maps that the images have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actvar.models.infinity.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Texts:
    """Hold a text for each image of a batch, and how all of them are drawn.

    Args:
        features: of the texts, each `[tokens, text_channels]`.
        schedule: `(1, h, w)` of every scale.
        tau: temperature of the draw.
    """

    features: tuple[Tensor, ...]
    schedule: Schedule
    tau: float = 0.5

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, images: slice) -> Texts:
        return replace(self, features=self.features[images])

    def take(self, images: Sequence[int]) -> Texts:
        """Return the texts with these numbers."""
        return replace(self, features=tuple(self.features[image] for image in images))

    def to(self, device: torch.device) -> Texts:
        """Return the texts with their features on a device."""
        return replace(self, features=tuple(text.to(device) for text in self.features))

    def joined(self) -> tuple[Tensor, list[int]]:
        """Return the features behind each other, `[sum of lengths, text_channels]`, and the lengths."""
        return torch.cat(self.features), [len(text) for text in self.features]


Conditions = Tensor | Texts
"""Classes `[B]` int64, or texts."""
Batch = tuple[Conditions, Tensor]
"""Conditions of `B` images, and inputs `[B, L - first, Cvae]` for teacher forcing."""


def text_tokens(conditions: Conditions) -> int:
    """Return the number of tokens of the longest text, which the others are filled up to; 0 for classes."""
    return max(map(len, conditions.features)) if isinstance(conditions, Texts) else 0


def features_of(conditions: Conditions) -> Tensor:
    """Return a tensor that tells conditions from others: the classes, or the features of all texts."""
    return conditions.joined()[0] if isinstance(conditions, Texts) else conditions
