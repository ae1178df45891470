"""Define in plain PyTorch how queries and keys are normalised and rotated."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rotate_heads(
    x: torch.Tensor, angles: torch.Tensor, index: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what `op.rotate_heads` does, computed in float32 or in x's dtype if that is wider."""
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    if scale is not None:
        unit = unit * scale.to(unit.dtype).view(-1, 1, 1)
    cosine, sine = angles if index is None else angles[:, index].unsqueeze(2)
    first, second = unit.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((cosine * first - sine * second, sine * first + cosine * second), dim=-1)
    return turned.flatten(-2).to(x.dtype)
