"""Attention of the kept tokens over the K/V cache and their own scale."""

from __future__ import annotations

import torch

from actvar_kernels.backend import backend_of
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
    room: tuple[torch.Tensor, torch.Tensor] | None = None,
    keep_cache: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`softmax(softmax_scale * q k^T + mask) v` per head, softmax in float32.

    Args:
        q: queries of the kept tokens, `[R, H, K, d]`, before QK norm.
        k, v: the scale's own keys and values, `[R, H, T, d]`: T = K rows, or all tokens of the scale.
        past: cached keys (already normalised) and values of earlier scales, each `[R, H, P, d]`, or None.
        head_scale: `[H]`; q and k are divided by their norm and q multiplied by it. None: no QK norm.
        mask: additive, broadcastable to `[R, H, K, P + T]`, or None.
        room: preallocated cache, keys and values `[R, H, capacity, d]` with capacity >= P + T, whose first P rows are
            `past`; the scale's own keys and values are appended there, and what is returned are views of it.
        keep_cache: whether the keys and values are needed afterwards.

    Returns:
        output `[R, K, H * d]`, and the keys and values attended to, `[R, H, P + T, d]`: the next cache; None in their
        place without `keep_cache`.

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
    if room is not None:
        _expect_room(room, past, k)
    backend_of("subset_attention", q, ("reference",))
    out, keys, values = reference.subset_attention(q, k, v, past, head_scale, softmax_scale, mask, room)
    return (out, keys, values) if keep_cache else (out, None, None)


def _expect_room(
    room: tuple[torch.Tensor, torch.Tensor], past: tuple[torch.Tensor, torch.Tensor] | None, k: torch.Tensor
) -> None:
    R, H, own, d = k.shape
    cached = 0 if past is None else past[0].shape[2]
    expect_shape("room for keys", room[0], (R, H, None, d))
    expect_shape("room for values", room[1], tuple(room[0].shape))
    if room[0].shape[2] < cached + own:
        raise ValueError(f"room: expected at least {cached + own} rows, got {room[0].shape[2]}")


def _expect_broadcastable(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(got not in (1, want) for got, want in pairs):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}")
