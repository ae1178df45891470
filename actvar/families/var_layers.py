"""Look at the layers of a VAR: kernels may read some of them, and the others must be called."""

from __future__ import annotations

from typing import Any

from torch import nn

from actvar.families.base import MODULATION, NORM, Called
from actvar.families.layers import called_for, first_called, layers_called, linear_called
from actvar.models.transformer_block import SelfAttention
from actvar.utils.plain_layers import why_called


def parts_called(block: Any) -> dict[str, Called]:
    """Return the parts of a block that kernels must not read, see `Family.parts_called`."""
    reasons = {NORM: ("ln_wo_grad", why_called(block.ln_wo_grad, nn.LayerNorm))}
    if not block.shared_aln:
        reasons[MODULATION] = ("ada_lin", _ada_lin_called(block.ada_lin))
    return layers_called(block, "attn", SelfAttention) | called_for(reasons)


def _ada_lin_called(ada_lin: Any) -> str | None:
    """Return why a block's AdaLN must be called, or None."""
    reason = why_called(ada_lin, nn.Sequential)
    if reason is None and len(ada_lin) != 2:
        return f"has {len(ada_lin)} layers"
    return (
        reason
        or first_called([("0", ada_lin[0])], lambda silu: why_called(silu, nn.SiLU))
        or (first_called([("1", ada_lin[1])], linear_called))
    )
