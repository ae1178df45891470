"""Attention and FFN of an accelerated block, apart, for methods that change which tokens they see."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actvar.families import var as family
from actvar.sparse.block import ActVARBlock, attend, state_of
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused, normalize_modulate

Pick = Callable[[torch.Tensor], torch.Tensor]


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows


class Sublayers:
    """A patched block at one scale `x` `[R, L, C]`: `x = x + attention(x)` and `x = x + ffn(x)` are the dense block."""

    def __init__(self, block: ActVARBlock, x: torch.Tensor, cond: torch.Tensor, scale: Scale):
        self.block, self.scale, self.fused = block, scale, choose_fused(x).fuses
        self.state = state_of(block, cond, self.fused)

    def attention(self, rows: torch.Tensor, pick: Pick = all_rows) -> torch.Tensor:
        """What attention adds to `rows` `[R, K, C]`, after `pick` has chosen among or merged the normalised ones; their
        keys and values go to the cache."""
        gamma1, _, scale1, _, shift1, _ = self.state.modulation
        u = pick(normalize_modulate(rows, scale1, shift1))
        return attend(self.block, u, u, self.state, self.scale, self.fused) * gamma1

    def ffn(self, rows: torch.Tensor, pick: Pick = all_rows) -> torch.Tensor:
        """What the FFN adds to `rows`, likewise."""
        _, gamma2, _, scale2, _, shift2 = self.state.modulation
        u = pick(normalize_modulate(rows, scale2, shift2))
        return family.dense_ffn(self.block, u, self.block.actvar.shared.config.num_experts) * gamma2


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` `[R, K]` of `x` `[R, L, C]`: `[R, K, C]`."""
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).unflatten(0, index.shape)


def flat(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens `index` `[R, K]` of `tokens` in every row, counted through all rows: `[R * K]`."""
    return (index + tokens * torch.arange(len(index), device=index.device).unsqueeze(1)).flatten()


def scale_at(block: ActVARBlock, x: torch.Tensor) -> Scale:
    """The scale that `x` `[R, L, C]` and the block's K/V cache are at."""
    return block.actvar.shared.scale_of(block.actvar.block_index, x.shape[1], family.cached_tokens(block))
