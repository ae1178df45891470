"""Record the choice of a block at one scale."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from actvar.families.base import BlockCall
from actvar.sparse.schedule import Scale


@dataclass
class BlockRecord:
    """Hold the choice of one block at one active scale.

    Args:
        block: number of the block.
        scale: the scale.
        index: tokens within the scale, `[R, K]` int64, or None without selection.
        scores: logits of the selector, `[R, L]` float32, or None without selection.
        u: the FFN's input, `[R, K, C]`.
        mask: experts that ran, `[R, K, N]` bool, or None without experts.
        logits: logits of the router, `[R, K, N]` float32, or None without experts.
        call: arguments of the block under teacher forcing, with all scales; None in sampling.
    """

    block: int
    scale: Scale
    index: Tensor | None
    scores: Tensor | None
    u: Tensor
    mask: Tensor | None
    logits: Tensor | None
    call: BlockCall | None = None

    def only(self, rows: list[int]) -> BlockRecord:
        """Return the record of the rows numbered `rows`, without the call."""
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, call=None)
