"""Select the tokens that a block updates at one scale, by its own selector or as the first block did."""

from __future__ import annotations

from typing import Any

import torch

from actvar.sparse.passes import Pass
from actvar.sparse.schedule import Scale
from actvar_kernels import Selection, normalize_modulate, select_tokens
from actvar_kernels.token_select.reference import gather_rows
from actvar_kernels.triton_backend.row_form import RowForm


def selected(
    block: Any,
    x: torch.Tensor,
    scale1: torch.Tensor,
    shift1: torch.Tensor,
    scale: Scale,
    current: Pass,
    in_place: bool = False,
    form: RowForm | None = None,
) -> Selection:
    """Return the tokens that a patched block keeps of one scale.

    Args:
        block: a patched block.
        x: the tokens of the scale, `[R, L, C]`.
        scale1, shift1: AdaLN's scale and shift for the kept tokens, each `[R, 1, C]`.
        scale: the scale of the tokens.
        current: the pass of the call, to which the first block adds its choice where all blocks update the same tokens.
        in_place, form: as in `actvar_kernels.select_tokens`.

    Raises:
        ValueError: all blocks update the first block's tokens, and it did not choose any in this pass.
    """
    gates, config = block.actvar, block.actvar.shared.config
    if config.fixed_tokens and gates.block_index > 0:
        index = current.tokens_of(scale.index, len(x))
        modulated = normalize_modulate(gather_rows(x, index), scale1, shift1, form=form)
        return Selection(index, modulated, None, x if in_place else x.clone())
    weight, bias = gates.selector.weight, gates.selector.bias
    share = config.share_cfg_selection and current.are_guided()
    adaln = scale1, shift1
    chosen = select_tokens(x, weight, bias, *adaln, scale.keep, share_guidance=share, in_place=in_place, form=form)
    if config.fixed_tokens:
        current.tokens[scale.index] = chosen.index
    return chosen
