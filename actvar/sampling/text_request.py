"""Hold a request for images of texts: the prompts with their features, the schedule, the guidance and the seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from actvar.families.conditions import Texts, text_tokens
from actvar.models.infinity.arguments import checked_draw
from actvar.models.infinity.schedules import Schedule
from actvar.utils.devices import device_of
from actvar.utils.fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class TextSampling:
    """Hold the arguments of a call of `Infinity.sample`.

    Args:
        prompts: the texts.
        labels: number of each image's prompt.
        schedule: `(1, h, w)` of every scale.
        cfg, tau, top_k, top_p: as in `Infinity.sample`, each one number.
        seed: one seed for the batch, or a tuple with one per image.
        features: of each prompt, `[tokens, text_channels]`; `run` needs them.

    Raises:
        TypeError, ValueError: numbers that `Infinity.sample` does not take, or labels that are no numbers of prompts.
    """

    prompts: tuple[str, ...]
    labels: tuple[int, ...]
    schedule: Schedule
    cfg: float = 4.0
    tau: float = 0.5
    top_k: int = 900
    top_p: float = 0.97
    seed: int | tuple[int, ...] = 0
    features: tuple[torch.Tensor, ...] = ()

    def __post_init__(self):
        checked_draw(len(self.schedule), 1, self.cfg, self.tau, self.top_k, self.top_p, self.seed, (0,))
        if not all(0 <= label < len(self.prompts) for label in self.labels):
            raise ValueError(f"labels: expected numbers of {len(self.prompts)} prompts, got {self.labels!r:.100}")

    @property
    def text_tokens(self) -> int:
        """Return the number of tokens of the longest text of the images, which the others are filled up to."""
        return text_tokens(self.texts)

    @property
    def texts(self) -> Texts:
        """Return the text of each image, with the maps and the temperature of the request."""
        return Texts(tuple(self.features[label] for label in self.labels), self.schedule, self.tau)

    def maps(self, model: Any) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale."""
        return tuple((h, w) for _, h, w in self.schedule)

    def each(self) -> Iterator[TextSampling]:
        """Yield the request for each image alone, of a request with one seed per image."""
        assert isinstance(self.seed, tuple)
        for label, seed in zip(self.labels, self.seed, strict=True):
            yield replace(self, labels=(label,), seed=(seed,))

    def settings(self) -> dict[str, object]:
        """Return everything that the images depend on beside the model, as JSON values."""
        names = ("prompts", "labels", "schedule", "cfg", "tau", "top_k", "top_p", "seed")
        named = ((str(number), features) for number, features in enumerate(self.features))
        settings: dict[str, object] = {name: getattr(self, name) for name in names}
        return settings | {"features": fingerprint(named)}

    def run(self, infinity: Any) -> torch.Tensor:
        """Sample `infinity`, dense or patched, and return RGB images `[B, 3, H, W]` in [0, 1]."""
        return self.run_with_bits(infinity)[0]

    def run_with_bits(self, infinity: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Do the same as `run`, and return also the bits of every scale, `[B, h, w, bits]` uint8."""
        return infinity.sample(
            *self.texts.to(device_of(infinity)).joined(),
            self.schedule,
            cfg=self.cfg,
            tau=self.tau,
            top_k=self.top_k,
            top_p=self.top_p,
            g_seed=self.seed,
            return_bits=True,
        )
