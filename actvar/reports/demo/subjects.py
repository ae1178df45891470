"""Turn the values of a page's controls into a request: of classes, or of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from actvar.models.infinity.schedules import Schedule
from actvar.sampling.request import Sampling
from actvar.sampling.text_request import TextSampling

ALL = "all classes"


class Classes:
    """Draw a class, or one image of each.

    Args:
        names: of the classes.

    Attributes:
        first: the request that the page begins with.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.first = Sampling(tuple(range(len(self.names))))

    def request(self, name: str, seed: float, cfg: float) -> Sampling:
        """Return the request for a class by its name, or for `ALL`.

        Args:
            name: of the class.
            seed: of the noise, a whole number.
            cfg: guidance strength.

        Raises:
            TypeError, ValueError: numbers as in `Sampling`, or an unknown class.
        """
        if name not in (ALL, *self.names):
            raise ValueError(f"class: expected one of {[ALL, *self.names]}, got {name!r:.100}")
        labels = self.first.labels if name == ALL else (self.names.index(name),)
        return Sampling(labels, float(cfg), seed=int(seed))


class Texts:
    """Draw an image of each prompt.

    Args:
        first: the request that the page begins with.
        encode: returns the features of prompts behind each other, and their lengths, as `actvar.TextEncoder` does.
        aspects: names of the aspect ratios to choose from, the first one at the beginning; empty where prompts tell it.
        schedule_of: returns the schedule of prompts and the name of an aspect ratio.
    """

    def __init__(
        self,
        first: TextSampling,
        encode: Callable[[Sequence[str]], tuple[torch.Tensor, list[int]]],
        aspects: Sequence[str],
        schedule_of: Callable[[Sequence[str], Any], Schedule],
    ):
        self.first, self.aspects = first, tuple(aspects)
        self._encode, self._schedule_of = encode, schedule_of

    def request(self, text: str, aspect: str | None, tau: float, seed: float, cfg: float) -> TextSampling:
        """Return the request for prompts, with features; every image has the same seed.

        Args:
            text: a prompt in each line.
            aspect: name of an aspect ratio; None where there are none.
            tau: temperature of the draw.
            seed: of the noise, a whole number.
            cfg: guidance strength.

        Raises:
            TypeError, ValueError: numbers as in `TextSampling`, no prompt, or the errors of the encoder.
        """
        prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not prompts:
            raise ValueError("prompts: expected one in each line, got none")
        if self.aspects and aspect not in self.aspects:
            raise ValueError(f"aspect: expected one of {list(self.aspects)}, got {aspect!r:.100}")
        features, lengths = self._encode(prompts)
        return replace(
            self.first,
            prompts=prompts,
            labels=tuple(range(len(prompts))),
            schedule=self._schedule_of(prompts, aspect),
            cfg=float(cfg),
            tau=float(tau),
            seed=(int(seed),) * len(prompts),
            features=tuple(features.cpu().split(lengths)),
        )
