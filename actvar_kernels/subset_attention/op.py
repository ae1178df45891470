"""Attend to the K/V cache and the own scale, with queries of the kept tokens."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import as_number, expect_one_device, expect_shape
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.situation import wants_gradient
from actvar_kernels.subset_attention import cpu_kernel, reference

_TRITON_HEAD_SIZES = (16, 32, 64, 128)
_LIMITS = f"float32, float16 and bfloat16, heads of {', '.join(map(str, _TRITON_HEAD_SIZES))} channels"


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
    """Return `softmax(softmax_scale * q k^T + mask) v` per head, with the softmax in float32.

    Triton takes one launch, for float32, float16 and bfloat16 and d of 16, 32, 64 or 128. Two more launches copy the
    past where the cache is kept and has no room. On the CPU a C++ kernel runs without a mask, for the same dtypes.

    Args:
        q: `[R, H, K, d]`, floating-point, queries of the kept tokens before QK norm.
        k, v: `[R, H, T, d]`, floating-point, keys and values of the own scale; T = K rows, or all tokens of the scale.
        past: cached keys (already normalised) and values of earlier scales, each `[R, H, P, d]`, or None.
        head_scale: `[H]`, floating-point; q and k are divided by their norm, and q is multiplied by it. None: no QK
            norm.
        softmax_scale: factor of the scores.
        mask: additive, broadcastable to `[R, H, K, P + T]`, or None; every query must see at least one key.
        room: preallocated cache, keys and values `[R, H, capacity, d]` with capacity >= P + T, whose first P rows are
            `past`; or None. Keys and values of the own scale are appended there, and views of the room are returned.
        keep_cache: whether the keys and values are needed afterwards.

    Returns:
        output `[R, K, H * d]` in v's dtype, and the keys and values attended to, `[R, H, P + T, d]`: the next cache.
        These are None without `keep_cache`.

    Raises:
        ValueError: shapes or devices that do not fit.
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
    expect_one_device(q, k, v, *(past or ()), head_scale, mask, *(room or ()))
    softmax_scale = as_number("softmax_scale", softmax_scale)
    backend = _choose(q, k, v, past, room, head_scale, mask)
    if backend.name == "reference":
        out, keys, values = reference.subset_attention(q, k, v, past, head_scale, softmax_scale, mask, room)
        return (out, keys, values) if keep_cache else (out, None, None)
    out, cache = _with_kernel(backend, q, k, v, past, head_scale, softmax_scale, mask, room, keep_cache)
    keys, values = (None, None) if cache is None or not keep_cache else cache
    return out, keys, values


def _choose(q, k, v, past, room, head_scale, mask) -> Backend:
    """Return the backend of a call with these tensors."""
    cache = room or past or ()

    def takes_triton() -> bool:
        optional = [tensor for tensor in (head_scale, mask) if tensor is not None]
        return q.shape[3] in _TRITON_HEAD_SIZES and in_kernel_dtypes(q, k, v, *cache, *optional)

    def why_not_in_cpp() -> str | None:
        if mask is not None:
            return "it takes no mask"
        dtype = cpu.computed_dtype(q)
        for tensor in (q, k, v, *cache):
            if tensor.dtype != dtype:
                found = [t.dtype for t in (q, k, v, *cache)]
                return f"it takes queries, keys and values in the dtype to compute in, got {found}"
        return cpu.why_not(q)

    return choose(
        "subset_attention",
        q,
        k,
        v,
        *(past or ()),
        *(room or ()),
        head_scale,
        mask,
        takes_triton=takes_triton,
        limits=_LIMITS,
        why_not_in_cpp=why_not_in_cpp,
    )


def _with_kernel(
    backend: Backend, q, k, v, past, head_scale, softmax_scale, mask, room, keep_cache
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the output, and the cache with the own keys and values where there is one to extend."""
    if torch.is_autocast_enabled(q.device.type):  # as the reference's attention does; kernels do not see autocast
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    cached, own = 0 if past is None else past[0].shape[2], k.shape[2]
    append = keep_cache or room is not None
    cache = None
    if append and backend.recorded and wants_gradient(q, k, v, *(past or ()), head_scale, mask):
        # an operator that writes in place has no gradient
        cache = past = reference.extended_cache(k, v, past, head_scale is not None, room)
        append = False
    elif append:
        past = room or _copied(past, k, v)
        cache = past[0][:, :, : cached + own], past[1][:, :, : cached + own]
    keys, values = past or (None, None)
    arguments = (q, k, v, keys, values, cached, head_scale, softmax_scale, mask)
    if not backend.recorded:
        return _run(backend, *arguments, append=append), cache
    operators = torch.ops.actvar_kernels
    attention = operators.subset_attention_append if append else operators.subset_attention
    return attention(*arguments), cache


def _copied(past, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a new cache that begins with `past` and ends with room for `k` and `v`."""
    R, H, own, d = k.shape
    cached = 0 if past is None else past[0].shape[2]
    cache = v.new_empty(R, H, cached + own, d), v.new_empty(R, H, cached + own, d)
    if past is not None and cached:
        for part, before in zip(cache, past, strict=True):
            part[:, :, :cached].copy_(before)
    return cache


def _expect_room(
    room: tuple[torch.Tensor, torch.Tensor], past: tuple[torch.Tensor, torch.Tensor] | None, k: torch.Tensor
) -> None:
    """Raise ValueError unless a preallocated cache has room for `past` and the own keys."""
    R, H, own, d = k.shape
    cached = 0 if past is None else past[0].shape[2]
    expect_shape("room for keys", room[0], (R, H, None, d))
    expect_shape("room for values", room[1], tuple(room[0].shape))
    if room[0].shape[2] < cached + own:
        raise ValueError(f"room: expected at least {cached + own} rows, got {room[0].shape[2]}")


def _expect_broadcastable(mask: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a mask broadcasts to `shape`."""
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(got not in (1, want) for got, want in pairs):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}")


def _run_operator(q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append: bool) -> torch.Tensor:
    """Run an operator of attention."""
    cache = None if keys is None else (keys, values)
    backend = _choose(q, k, v, cache, None, head_scale, mask)
    return _run(backend, q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append)


def _run(
    backend: Backend, q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append: bool
) -> torch.Tensor:
    """Attend to the first `cached` rows of `keys` and `values`, and to `k` and `v`; with `append` add these there."""
    if backend.name == "triton":
        from actvar_kernels.subset_attention import triton_kernel

        return triton_kernel.subset_attention(
            q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append=append
        )
    if backend.name == "cpu":
        return cpu_kernel.subset_attention(q, k, v, keys, values, cached, head_scale, softmax_scale, append)
    past = (keys[:, :, :cached], values[:, :, :cached]) if cached else None
    room = (keys, values) if append else None
    return reference.subset_attention(q, k, v, past, head_scale, softmax_scale, mask, room)[0]


@torch.library.custom_op("actvar_kernels::subset_attention", mutates_args=())
def _subset_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    cached: int,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    return _run_operator(q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append=False)


@torch.library.custom_op("actvar_kernels::subset_attention_append", mutates_args=("keys", "values"))
def _subset_attention_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cached: int,
    head_scale: torch.Tensor | None,
    softmax_scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    return _run_operator(q, k, v, keys, values, cached, head_scale, softmax_scale, mask, append=True)


@_subset_attention.register_fake
@_subset_attention_append.register_fake
def _(q, k, v, *_):
    R, H, K, d = q.shape
    return v.new_empty(R, K, H * d)


def _attention_alone(q, k, v, keys, values, cached, head_scale, softmax_scale, mask) -> torch.Tensor:
    """Return what the operator `subset_attention` does, by the reference."""
    past = (keys[:, :, :cached], values[:, :, :cached]) if cached else None
    return reference.subset_attention(q, k, v, past, head_scale, softmax_scale, mask, room=None)[0]


register_reference_gradient(_subset_attention, _attention_alone)


def subset_attention_flops(q_shape, k_shape, _v_shape, _keys_shape, _values_shape, cached, *_args, **_kwargs) -> int:
    """Return the FLOPs of one operator of attention: every query meets every key."""
    R, H, K, d = q_shape
    return 2 * 2 * R * H * K * (cached + k_shape[2]) * d


register_flop_formula([torch.ops.actvar_kernels.subset_attention, torch.ops.actvar_kernels.subset_attention_append])(
    subset_attention_flops
)
