"""Give the angles by which queries and keys are rotated, from the place of their tokens in the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from actvar.models.infinity.schedules import largest_map
from actvar.utils.modes import inference_mode

BASE = 10000.0
MOST_KEPT = 16

_kept: dict[tuple, torch.Tensor] = {}
"""Angles by schedule, size of a head and device."""


def rotation(schedule: Sequence[tuple[int, int, int]], head_dim: int, device: torch.device) -> torch.Tensor:
    """Return cosine and sine of the angles of all scales' tokens, `[2, L, head_dim / 2]` float32.

    The maps of all scales are stretched to the largest one of their aspect ratio, so that a place in the image has
    one angle at all scales. The first half of the angles follows the row, the second the column.

    Args:
        schedule: `(1, h, w)` of every scale.
        head_dim: size of an attention head, a multiple of 4.
        device: device of the result.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:  # such tensors must not be kept
        return _rotation(schedule, head_dim, device)
    return _kept_rotation(schedule, head_dim, device)


@inference_mode(False)  # angles of a sample may serve a later training
def _kept_rotation(schedule: Sequence[tuple[int, int, int]], head_dim: int, device: torch.device) -> torch.Tensor:
    """Return what `rotation` does, computed once for the schedules that were asked for last."""
    key = tuple(schedule), head_dim, device
    if key not in _kept:
        if len(_kept) == MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = _rotation(schedule, head_dim, device)
    return _kept[key]


def _rotation(schedule: Sequence[tuple[int, int, int]], head_dim: int, device: torch.device) -> torch.Tensor:
    """Return what `rotation` does, whatever the default dtype and device are."""
    numbers = partial(torch.arange, dtype=torch.float32, device="cpu")
    frequencies = 1 / BASE ** (numbers(0, head_dim // 2, 2) / (head_dim // 2))
    height, width = largest_map(schedule)
    angles = []
    for _, h, w in schedule:
        rows = (numbers(h) * (height / h)).round()[:, None].expand(h, w).reshape(-1, 1)
        columns = (numbers(w) * (width / w)).round()[None].expand(h, w).reshape(-1, 1)
        angles.append(torch.cat((rows * frequencies, columns * frequencies), dim=1))
    angle = torch.cat(angles)
    return torch.stack((angle.cos(), angle.sin())).to(device)
