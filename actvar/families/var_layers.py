"""Look at the layers of a VAR: kernels may read some of them, and the others must be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actvar.families.base import MODULATION, NORM, Called
from actvar.families.layers import called_for, first_called, layers_called, linear_called
from actvar.models.transformer_block import SelfAttention
from actvar.utils.plain_layers import why_called
from actvar_kernels import choose_fused, linears
from actvar_kernels.linear.linears import MOST_LAYERS


def parts_called(block: Any) -> dict[str, Called]:
    """Return the parts of a block that kernels must not read, see `Family.parts_called`."""
    reasons = {NORM: ("ln_wo_grad", why_called(block.ln_wo_grad, nn.LayerNorm))}
    if not block.shared_aln:
        reasons[MODULATION] = ("ada_lin", ada_lin_called(block.ada_lin))
    return layers_called(block, "attn", SelfAttention) | called_for(reasons)


def ada_lin_called(ada_lin: Any) -> str | None:
    """Return why a block's AdaLN must be called, or None."""
    reason = why_called(ada_lin, nn.Sequential)
    if reason is None and len(ada_lin) != 2:
        return f"has {len(ada_lin)} layers"
    return (
        reason
        or first_called([("0", ada_lin[0])], lambda silu: why_called(silu, nn.SiLU))
        or (first_called([("1", ada_lin[1])], linear_called))
    )


def modulations_at_once(blocks: Sequence[Any], cond: Tensor) -> list[tuple[Tensor, ...]] | None:
    """Return `Family.modulations` of blocks with an AdaLN projection each: on Triton in two launches.

    Args:
        blocks: each has its projection as `ada_lin`.
        cond: embedded classes, `[R, C]`.
    """
    if torch.is_grad_enabled() or not choose_fused(cond).fuses_residual or torch.is_autocast_enabled(cond.device.type):
        return None
    if len(blocks) > MOST_LAYERS or any(ada_lin_called(block.ada_lin) is not None for block in blocks):
        return None
    weights, biases = zip(*((block.ada_lin[1].weight, block.ada_lin[1].bias) for block in blocks), strict=True)
    if len({weight.shape for weight in weights}) > 1 or any(t.dtype != cond.dtype for t in (*weights, *biases)):
        return None
    of_blocks = linears(F.silu(cond), weights, biases).unflatten(-1, (6, -1)).unsqueeze(2)
    return [part.unbind(2) for part in of_blocks.unbind(0)]
