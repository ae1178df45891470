"""List the questions about what images are drawn from, and about a model's predictions on given token maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from actvar.families.base import Embedded, OnScale
    from actvar.families.conditions import Conditions


class Drawing(Protocol):
    """Answer how a family draws images; `model` is not inside a wrapper.

    Conditions are classes or texts, `B` of them. Token maps are tokens `[B, L]` int64, or bits `[B, L, bits]` uint8.
    Logits are `[R, L, V]`, or `[R, L, bits, 2]` where each bit is drawn for itself. Temperatures are part of them.
    """

    draws_from_texts: bool
    """True where conditions are texts, False where they are classes."""
    default_cfg: float
    """Strength of guidance where none is given."""

    def drawing_twin(self, model: Any, tokenizer: Any = None) -> Any:
        """Return a model with the same weights, not copied, that draws samples; None where `model` itself does.

        Args:
            model: the model.
            tokenizer: what the twin decodes images by; None for one that turns bits into codes and no more.
        """
        ...

    def maps_of(self, model: Any, conditions: Conditions) -> tuple[tuple[int, int], ...]:
        """Return height and width of the token map of every scale of images that are drawn from `conditions`."""
        ...

    def with_unconditional(self, model: Any, conditions: Conditions) -> Conditions:
        """Return `2B` conditions, those that are given and then as many unconditional ones."""
        ...

    def strength(self, cfg: float, scale: int, count: int) -> float:
        """Return t of the guided logits `(1 + t) * conditional - t * unconditional` at one of `count` scales."""
        ...

    def images(self, model: Any, conditions: Conditions, seed: int, cfg: float) -> Tensor:
        """Draw images `[B, C, H, W]` in [0, 1], with the model's default filters."""
        ...

    def token_maps(self, model: Any, conditions: Conditions, seed: int, cfg: float) -> Tensor:
        """Return the token maps of images that `images` would draw; no image is decoded."""
        ...

    def teacher_input(self, model: Any, conditions: Conditions, token_maps: Tensor) -> Tensor:
        """Return inputs `[B, L - first, Cvae]` float32 for teacher forcing; the first scale has `first` tokens."""
        ...

    def predicted(self, model: Any, conditions: Conditions, inputs: Tensor) -> Tensor:
        """Return the logits of all scales by the model's own teacher forcing.

        Args:
            conditions: of `R` rows.
            inputs: as `teacher_input` returns them, `[R, L - first, Cvae]`.
        """
        ...

    def embedded(self, model: Any, conditions: Conditions, inputs: Tensor) -> Embedded:
        """Return the arguments of the first block under teacher forcing; arguments are those of `predicted`."""
        ...

    def logits(self, model: Any, x: Tensor, head_cond: Any) -> Tensor:
        """Return the logits of the last block's output `x` `[R, L, C]`, float32."""
        ...

    def scale_logits(self, model: Any, conditions: Conditions, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the logits of every scale that is sampled, through the K/V cache.

        The `B` conditional rows come first, then the unconditional ones.

        Args:
            conditions: of `B` images.
            inputs: as `teacher_input` returns them, `[B, L - first, Cvae]`.
        """
        ...

    def watch_scales(self, model: Any, on_scale: OnScale) -> AbstractContextManager[None]:
        """Call `on_scale` after every scale that is sampled while the context is open."""
        ...
