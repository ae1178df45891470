"""List what the mixin of a patched model reads and calls of the patch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class PatchedState(Protocol):
    """Describe what a `model_mixin` reads of the patch at `self.actvar`, an `actvar.sparse.state.PatchState`."""

    config: Any
    execution: Any
    graphs: Any
    strengths: Any
    modulations: Any
    seed: Tensor | None
    rows_are_guided: bool
    rows_stand_alone: bool
    schedule: Any
    first_tuned: int
    scale_is_tuned: bool

    def during(self, **flags: Any) -> AbstractContextManager[None]:
        """Set flags of the state while the context is open."""
        ...

    def begin_pass(self, model: Any) -> None:
        """Begin a teacher-forced pass through `model`.

        Raises:
            ValueError: the blocks are not those that were patched.
        """
        ...

    def end_pass(self) -> None:
        """End the pass that `begin_pass` began."""
        ...

    def fit_maps(self, model: Any, maps: tuple[tuple[int, int], ...]) -> None:
        """Plan the scales of a sample or pass that brings token maps of its own, height and width of each.

        Raises:
            ValueError: the configuration names a scale that is not there.
        """
        ...

    def sampling(self, model: Any, in_place: bool, guided: bool = True) -> AbstractContextManager[None]:
        """Sample while the context is open; the K/V caches are empty afterwards.

        Args:
            model: the patched model.
            in_place: the loop never reads a block's input again; False is always right.
            guided: conditional rows come first, then as many unconditional ones; otherwise all rows stand alone.
        """
        ...

    def begin_head(self, model: Any, tokens: int) -> None:
        """Look at the head's layers before a call of the head on `tokens` tokens a row."""
        ...

    def expect_own_blocks(self, model: Any) -> None:
        """Check that the blocks of `model` are those that were patched, in their order.

        Raises:
            ValueError: they are not.
        """
        ...
