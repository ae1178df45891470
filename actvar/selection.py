"""Which tokens a block updates at one scale: its own selector's choice, or that of the first block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from actvar.schedule import Scale
from actvar_kernels import normalize_modulate, select_tokens
from actvar_kernels.token_select.reference import gather_rows


class Selected(NamedTuple):
    """As `actvar_kernels.token_select.Selection`; `scores` is None where the first block has chosen."""

    index: torch.Tensor
    modulated: torch.Tensor
    scores: torch.Tensor | None
    rest: torch.Tensor


def selected(
    block: nn.Module, x: torch.Tensor, scale1: torch.Tensor, shift1: torch.Tensor, scale: Scale, in_place: bool = False
) -> Selected:
    """The tokens that a patched block keeps of `x` `[R, L, C]`, the tokens of one scale, modulated by `scale1` and
    `shift1` `[R, 1, C]`; `in_place` as in `select_tokens`."""
    gates, shared = block.actvar, block.actvar.shared
    if shared.config.fixed_tokens and gates.block_index > 0:
        index = shared.fixed[scale.index]
        modulated = normalize_modulate(gather_rows(x, index), scale1, shift1)
        return Selected(index, modulated, None, x if in_place else x.clone())
    weight, bias, share = gates.selector.weight, gates.selector.bias, shared.selection_is_shared
    chosen = select_tokens(x, weight, bias, scale1, shift1, scale.keep, share_guidance=share, in_place=in_place)
    if shared.config.fixed_tokens:
        shared.fixed[scale.index] = chosen.index
    return Selected(*chosen)
