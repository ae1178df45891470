"""Attention of the kept tokens over the K/V cache and their own scale."""

from __future__ import annotations

import torch

from actvar_kernels.backend import implementation
from actvar_kernels.checks import expect_shape
from actvar_kernels.subset_attention import reference


def subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`softmax(softmax_scale * q k^T + mask) v` per head, softmax in float32.

    Args:
        q: queries of the kept tokens, `[R, H, K, d]`, before QK norm.
        k, v: the scale's own keys and values, `[R, H, T, d]`: T = K rows, or all tokens of the scale.
        past: cached keys (already normalised) and values of earlier scales, each `[R, H, P, d]`, or None.
        head_scale: `[H]`; q and k are divided by their norm and q multiplied by it. None: no QK norm.
        mask: additive, broadcastable to `[R, H, K, P + T]`, or None.

    Returns:
        output `[R, K, H * d]`, and the keys and values attended to, `[R, H, P + T, d]`: the next cache.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("q", q, (None, None, None, None))
    R, H, _, d = q.shape
    expect_shape("k", k, (R, H, None, d))
    expect_shape("v", v, tuple(k.shape))
    if past is not None:
        expect_shape("past keys", past[0], (R, H, None, d))
        expect_shape("past values", past[1], tuple(past[0].shape))
    if head_scale is not None:
        expect_shape("head_scale", head_scale, (H,))
    if mask is not None:
        _expect_broadcastable(mask, (R, H, q.shape[2], k.shape[2] + (0 if past is None else past[0].shape[2])))
    run = implementation("subset_attention", {"reference": reference.subset_attention})
    return run(q, k, v, past, head_scale, softmax_scale, mask)


def _expect_broadcastable(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(got not in (1, want) for got, want in pairs):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}")
