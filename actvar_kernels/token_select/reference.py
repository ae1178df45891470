"""Define token selection in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.constants import NORM_EPS


def top_indices(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return indices `[..., keep]` of the highest scores `[..., L]`, ascending, ties to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows `index` `[R, K]` int64 of `x` `[R, L, C]` as `[R, K, C]`."""
    R, L, C = x.shape
    return x.reshape(R * L, C)[flat_index(index, L)]


def flat_index(index: torch.Tensor, length: int) -> torch.Tensor:
    """Return indices `[R, K]` into sequences of `length` as indices into all rows at once."""
    return index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * length


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
) -> tuple[torch.Tensor, ...]:
    """Return index, modulated rows, scores and base, which is x, see `op.select_tokens`."""
    normalized, scores = _scored(x, weight, bias)
    deciding = scores[: x.shape[0] // 2] if share_guidance else scores
    index = top_indices(deciding, keep)
    if share_guidance:
        index = index.repeat(2, 1)
    modulated = _modulated(gather_rows(normalized, index), scale, shift)
    return index, modulated.to(x.dtype), scores, x


def at_index(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Return modulated rows, scores and base of a selection whose index is known."""
    normalized, scores = _scored(x, weight, bias)
    modulated = _modulated(gather_rows(normalized, index), scale, shift)
    return modulated.to(x.dtype), scores, x


def _scored(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return LN of `x` and the scores `[R, L]` float32."""
    normalized = _normalized(x)
    # a sum over each row, since a matrix product may round equal rows differently and so break ties at random
    return normalized, (normalized.float() * weight.float()).sum(dim=-1) + bias.float()


def normalize_modulate(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, guidance: float | None = None
) -> torch.Tensor:
    """Return what `op.normalize_modulate` does."""
    modulated = _modulated(_normalized(x), scale, shift)
    if guidance is not None:
        cond, uncond = modulated.chunk(2)
        modulated = (1 + guidance) * cond - guidance * uncond
    return modulated.to(x.dtype)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """Return `LN(x)` without affine part, in float32 or x's dtype if that is wider."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=NORM_EPS)


def _modulated(normalized: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return `normalized * (1 + scale) + shift`."""
    dtype = normalized.dtype
    return torch.addcmul(shift.to(dtype), normalized, scale.to(dtype) + 1)
