"""Teach the transformer to correct its own mistakes (Han et al. 2024, "Infinity", section 3.3).

In training a model sees the token maps of real images; in sampling it sees its own. So some of the tokens it is shown
are replaced by what it would have drawn, and the finer scales are encoded anew: their targets make up for the mistake.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from actvar.models.quantizer import VectorQuantizer


def draw_tokens(logits: torch.Tensor) -> torch.Tensor:
    """One token `[B, L]` per position from `logits` `[B, L, V]`."""
    return logits.flatten(0, 1).float().softmax(dim=-1).multinomial(1).view(logits.shape[:2])


def corrected(
    quantizer: VectorQuantizer, features: torch.Tensor, drawn: Sequence[torch.Tensor], shown: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and inputs of teacher forcing when some of the drawn tokens stand in for the right ones.

    Args:
        features: the encoder's output `[B, Cvae, P, P]`.
        drawn: one token map `[B, p * p]` per scale.
        shown: bool, like `drawn`: where the drawn token is what the next scales see.

    Returns:
        tokens `[B, L]`, each scale the nearest codes to what the scales before it leave over; and the transformer's
        input `[B, L - p_0^2, Cvae]`, see `VectorQuantizer.teacher_input`.
    """
    rest, targets, inputs = features.clone(), [], []
    for scale, side in enumerate(quantizer.v_patch_nums):
        if scale > 0:
            partial = F.interpolate(features - rest, size=(side, side), mode="area")
            inputs.append(partial.flatten(2).transpose(1, 2))
        nearest = quantizer.nearest(quantizer.pooled_rows(rest, scale)).view(len(rest), -1)
        targets.append(nearest)
        seen = torch.where(shown[scale], drawn[scale], nearest)
        rest -= quantizer.upsampled(quantizer.code_map(seen, side), scale)
    return torch.cat(targets, dim=1), torch.cat(inputs, dim=1)
