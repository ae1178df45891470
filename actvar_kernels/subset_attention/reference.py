"""Define subset attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.situation import is_transforming


def subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    mask: torch.Tensor | None,
    room: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, keys and values, see `op.subset_attention`."""
    if head_scale is not None:
        q = F.normalize(q, dim=-1) * head_scale.view(1, -1, 1, 1)
    k, v = extended_cache(k, v, past, head_scale is not None, room)
    if not torch.is_autocast_enabled(q.device.type):
        q, k = q.to(v.dtype), k.to(v.dtype)
    return attend(q, k, v, mask, softmax_scale).transpose(1, 2).flatten(2), k, v


def extended_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    normed: bool,
    room: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `past` followed by `k` and `v`, in `room` if there is one.

    Args:
        k, v: `[R, H, T, d]`, floating-point.
        past, room: as in `op.subset_attention`.
        normed: whether `k` is divided by its norm.
    """
    if normed:
        k = F.normalize(k, dim=-1)
    if room is not None:
        return _append(room[0], past, k), _append(room[1], past, v)
    if past is not None:
        return torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return k, v


def _append(room: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None, own: torch.Tensor) -> torch.Tensor:
    """Write `own` to the room behind `past`, and return the rows that are used."""
    start = 0 if past is None else past[0].shape[2]
    room[:, :, start : start + own.shape[2]] = own
    return room[:, :, : start + own.shape[2]]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return `softmax(scale * q k^T + mask) v` for `[R, H, L, d]` tensors.

    With gradients on a CPU it is written out. There the backward pass of torch's fused attention takes 3.6 times as
    long (32 x 3 heads, 130 tokens, bfloat16), and has no forward-mode derivative.
    """
    differentiated = torch.is_grad_enabled() and q.requires_grad
    if q.device.type == "cpu" and (differentiated or (not torch.compiler.is_compiling() and is_transforming())):
        scores = (q * scale) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(dim=-1, dtype=wide).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
