"""The layers of an accelerated block, apart, for methods that change which tokens they see."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actvar.families.base import BlockCall, Rows
from actvar.sparse.block import ActVARBlock, attend, sample_state_of
from actvar.sparse.layer_calls import in_dtype
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused, normalize_modulate

Pick = Callable[[torch.Tensor], torch.Tensor]


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return `rows`: nothing is chosen or merged."""
    return rows


class Sublayers:
    """A patched block at one scale: `x = x + attention(x)`, `x = x + between(x)` and `x = x + ffn(x)` are the block.

    `between` is the layer between attention and FFN, such as cross-attention, where there is one.
    """

    def __init__(self, block: ActVARBlock, call: BlockCall, scale: Scale):
        self.block, self.call, self.scale, self.fused = block, call, scale, choose_fused(call.x).fuses
        self.family = block.actvar.family
        self.state = sample_state_of(block, call.cond, scale, self.fused)

    def by_name(self) -> dict[str, Callable[..., torch.Tensor]]:
        """Return the layers in their order."""
        between = {"between": self.between} if self.family.has_between else {}
        return {"attention": self.attention, **between, "ffn": self.ffn}

    def attention(self, rows: torch.Tensor, pick: Pick = all_rows, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return what attention adds to a block's rows, and put their keys and values into the cache.

        Args:
            rows: `[R, K, C]`.
            pick: chooses or merges the normalised rows; for blocks that encode no position in queries and keys.
            index: number of each row's token in the scale, `[R, K]` int64; None for all tokens.
        """
        gamma1, _, scale1, _, shift1, _ = self.state.modulation
        u = pick(self._normalized(rows, scale1, shift1))
        return attend(self.block, u, u, self.state, self.scale, self.fused, self._at(index), self.call) * gamma1

    def between(self, rows: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the layer between attention and FFN adds to a block's rows `[R, K, C]`, see `attention`."""
        gamma, scale, shift = self.family.between_norm(self.block, len(rows))
        u = self._normalized(rows, scale, shift)
        return self.family.between(self.block, u, self._at(index), self.call) * gamma

    def ffn(self, rows: torch.Tensor, pick: Pick = all_rows, index: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the FFN adds to a block's rows `[R, K, C]`, see `attention`."""
        _, gamma2, _, scale2, _, shift2 = self.state.modulation
        u = pick(self._normalized(rows, scale2, shift2))
        return self.family.dense_ffn(self.block, u, self.block.actvar.shared.config.num_experts) * gamma2

    def _normalized(self, rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Return the rows after a norm, in the dtype that the next layer takes."""
        return in_dtype(normalize_modulate(rows, scale, shift), self.family.layer_dtype(self.block))

    def _at(self, index: torch.Tensor | None) -> Rows:
        return Rows(self.scale.start, self.scale.tokens, index)


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows `[R, K, C]` of `x` `[R, L, C]` that `index` `[R, K]` int64 names."""
    return x.flatten(0, 1).index_select(0, flat(index, x.shape[1])).unflatten(0, index.shape)


def flat(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the tokens `index` `[R, K]` int64, of `tokens` in a row, counted through all rows, `[R * K]`."""
    return (index + tokens * torch.arange(len(index), device=index.device).unsqueeze(1)).flatten()


def scale_at(block: ActVARBlock, call: BlockCall) -> Scale:
    """Return the scale that a call and the block's K/V cache are at."""
    state = block.actvar
    return state.shared.scale_of(state.block_index, call, state.family.cache(block).rows)
