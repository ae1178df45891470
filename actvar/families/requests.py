"""Hold what a sample of a patched model depends on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """Hold what a sample by the fast sampler depends on.

    Attributes:
        inputs: tensors whose values may differ from one replay of a graph to the next; the first are seeds, of the
            batch `[1]` or of every image `[B]` int64.
        settings: everything else, with a hash, which a graph is captured for.
        held: further tensors that a graph reads where they lie.
    """

    inputs: tuple[Tensor, ...]
    settings: tuple
    held: tuple[Tensor, ...] = ()
