"""Stand in for CUDA graphs on a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from actvar.families import infinity_mixin
from actvar.sparse import sample_graphs


@dataclass
class Card:
    """Count what the stand-in does. A replay runs the sample again, into the memory of the capture.

    `error` is raised by a capture, and `off` is added to the images that a replay draws.
    """

    captures: int = 0
    replays: int = 0
    warm_ups: int = 0
    pools: list = field(default_factory=list)
    error: Exception | None = None
    off: float = 0.0

    def warmed_up(self, sample):
        self.warm_ups += 1
        return sample()

    def captured(self, sample, pool):
        if self.error is not None:
            raise self.error
        self.captures += 1
        self.pools.append(pool)
        results = sample()

        def replay():
            self.replays += 1
            for kept, drawn in zip(results, sample(), strict=True):
                kept.copy_(drawn)
            results[0].add_(self.off)

        return replay, results


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Let the graphs take a model on the CPU for one on a GPU."""
    card = Card()
    for module in (sample_graphs, infinity_mixin):
        monkeypatch.setattr(module, "is_on_gpu", lambda model: True)
    monkeypatch.setattr(sample_graphs, "backend_of", lambda *_: "triton")
    monkeypatch.setattr(sample_graphs, "warmed_up", card.warmed_up)
    monkeypatch.setattr(sample_graphs, "captured", card.captured)
    monkeypatch.setattr(sample_graphs, "new_pool", object)
    return card
