"""Subset attention's kernel against the reference: its output, the cache it appends to, and what it must not read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from actvar_kernels import BackendUnavailableError, subset_attention
from actvar_kernels.subset_attention import reference
from actvar_kernels.subset_attention.op import subset_attention_flops

R, H = 2, 2
SIZES = {
    "one token, nothing cached": dict(K=1, T=1, P=0, d=64),
    "27 tokens, 5 cached": dict(K=27, T=27, P=5, d=64),
    "keys of all tokens": dict(K=27, T=36, P=14, d=32),
    "several tiles": dict(K=65, T=65, P=33, d=16),
    "no QK norm": dict(K=9, T=9, P=5, d=64, normed=False),
    "128 channels a head": dict(K=9, T=17, P=5, d=128),
}
DTYPES = [torch.float32, torch.float16]


def heads(tokens: int, parts: int, d: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`parts` views `[R, H, tokens, d]` of one projection `[R, tokens, parts * H * d]`, as the block makes them."""
    projected = normal(R, tokens, parts * H * d, seed=seed, dtype=dtype)
    return projected.unflatten(-1, (parts, H, d)).permute(2, 0, 3, 1, 4).unbind(0)


def inputs(
    K: int, T: int, P: int, d: int, normed: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor | None], float]:
    """q, k, v, cached keys, cached values and head scales; and the softmax scale."""
    q, k, v = heads(K, 3, d, 0, dtype) if K == T else (*heads(K, 1, d, 0, dtype), *heads(T, 2, d, 1, dtype))
    keys = values = None
    if P:
        keys = F.normalize(normal(R, H, P, d, seed=2), dim=-1).to(dtype)
        values = normal(R, H, P, d, seed=3, dtype=dtype)
    head_scale = torch.tensor([1.5, 9.0], dtype=dtype) if normed else None
    return [q, k, v, keys, values, head_scale], 1.0 if normed else 0.25 / d**0.5


def on(attention: Callable[..., tuple], softmax_scale: float, **options) -> Callable[..., Tensor]:
    """The output of `attention` as a function of the tensors of `inputs`, and of a mask."""

    def output(q, k, v, keys, values, head_scale, mask=None) -> Tensor:
        past = None if keys is None else (keys, values)
        return attention(q, k, v, past, head_scale, softmax_scale, mask, **options)[0]

    return output


def roomy(keys: Tensor | None, values: Tensor | None, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A cache of `rows` rows that begins with `keys` and `values`; the rest is NaN."""
    shape = (*like.shape[:2], rows, like.shape[3])
    room = like.new_full(shape, torch.nan), like.new_full(shape, torch.nan)
    if keys is not None:
        room[0][:, :, : keys.shape[2]], room[1][:, :, : keys.shape[2]] = keys, values
    return room


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_with_room_it_attends_as_the_reference_and_appends_to_the_cache(
    size: str, dtype: torch.dtype, grid_order: str
) -> None:
    tensors, softmax_scale = inputs(**SIZES[size], dtype=dtype)
    q, k, v, keys, values, head_scale = tensors
    P, T = SIZES[size]["P"], SIZES[size]["T"]
    room = roomy(keys, values, v, P + T + 7)
    past = (room[0][:, :, :P], room[1][:, :, :P]) if P else None

    output, all_keys, all_values = subset_attention(q, k, v, past, head_scale, softmax_scale, room=room)
    assert output.is_contiguous()
    assert output.dtype == dtype
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    assert_close(output, exact, tolerance)

    for part, buffer in ((all_keys, room[0]), (all_values, room[1])):
        assert part.data_ptr() == buffer.data_ptr()
        assert part.shape == (R, H, P + T, q.shape[3])
        assert buffer[:, :, P + T :].isnan().all()
    assert torch.equal(all_values[:, :, P:], v)
    if P:
        assert torch.equal(all_keys[:, :, :P], keys)
        assert torch.equal(all_values[:, :, :P], values)
    if head_scale is None:
        assert torch.equal(all_keys[:, :, P:], k)
    else:
        assert_close(all_keys[:, :, P:], *exact_and_tolerance(lambda k: F.normalize(k, dim=-1), k))


@pytest.mark.parametrize("keep_cache", [True, False], ids=["cache kept", "cache dropped"])
@pytest.mark.parametrize("size", ["one token, nothing cached", "keys of all tokens"])
def test_without_room_it_makes_a_new_cache_or_none(size: str, keep_cache: bool, grid_order: str) -> None:
    tensors, softmax_scale = inputs(**SIZES[size])
    q, k, v, keys, values, head_scale = tensors
    past = None if keys is None else (keys.clone(), values.clone())
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    output, *cache = subset_attention(q, k, v, past, head_scale, softmax_scale, keep_cache=keep_cache)
    assert_close(output, exact, tolerance)
    if keep_cache:
        _, *expected = reference.subset_attention(q, k, v, past, head_scale, softmax_scale, None, None)
        torch.testing.assert_close(cache, expected)
    else:
        assert cache == [None, None]
    if past is not None:
        assert torch.equal(past[0], keys)
        assert torch.equal(past[1], values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_may_have_its_tokens_before_its_heads(dtype: torch.dtype) -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"], dtype=dtype)
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    tensors[3:5] = (cached.transpose(1, 2).contiguous().transpose(1, 2) for cached in tensors[3:5])
    assert_close(on(subset_attention, softmax_scale, keep_cache=False)(*tensors), exact, tolerance)


def test_a_last_axis_with_gaps_is_read_rightly() -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"])
    expected = on(subset_attention, softmax_scale)(*tensors)
    gaps = [None if t is None else t.repeat_interleave(2, dim=-1)[..., ::2] for t in tensors]
    assert torch.equal(on(subset_attention, softmax_scale)(*gaps), expected)


def test_keys_cached_in_float32_meet_queries_in_float16() -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"], dtype=torch.float16)
    expected = on(subset_attention, softmax_scale)(*tensors)
    tensors[3] = tensors[3].float()
    output = on(subset_attention, softmax_scale)(*tensors)
    assert output.dtype == torch.float16
    assert torch.equal(output, expected)


def block_causal(counts: list[int], P: int = 0) -> Tensor:
    """Every scale sees itself, earlier ones and the P cached keys."""
    level = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    hidden = F.pad(level[:, None] < level[None, :], (P, 0))
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -torch.inf)


def first_keys_hidden(queries: int, keys: int, hidden: int) -> Tensor:
    mask = normal(R, 1, queries, keys, seed=7)
    mask[..., :hidden] = -torch.inf
    return mask


MASKS = {
    "block-causal": (dict(K=70, T=70, P=0, d=16), block_causal([1, 4, 25, 40])),
    "block-causal after a cache": (dict(K=21, T=21, P=5, d=64), block_causal([5, 16], P=5)),
    "a bias that hides whole tiles, one for all heads": (dict(K=5, T=70, P=70, d=16), first_keys_hidden(5, 140, 104)),
    "one row for all queries": (dict(K=5, T=9, P=5, d=64), normal(1, 14, seed=8)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_added_to_the_scores(name: str, dtype: torch.dtype, grid_order: str) -> None:
    size, mask = MASKS[name]
    tensors, softmax_scale = inputs(**size, dtype=dtype)
    tensors.append(mask.to(dtype))
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    assert_close(on(subset_attention, softmax_scale, keep_cache=False)(*tensors), exact, tolerance)


def test_a_key_of_zeros_stays_zero() -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"])
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0, 3] = 0
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    assert_close(on(subset_attention, softmax_scale)(*tensors), exact, tolerance)


def test_scores_of_hundreds_do_not_overflow() -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"])
    tensors[5] = torch.tensor([100.0, 1000.0])
    exact, tolerance = exact_and_tolerance(on(reference.subset_attention, softmax_scale, room=None), *tensors)
    assert_close(on(subset_attention, softmax_scale)(*tensors), exact, tolerance)


def test_every_run_gives_the_same_bits(grid_order: str) -> None:
    tensors, softmax_scale = inputs(**SIZES["several tiles"], dtype=torch.float16)
    first, second = (on(subset_attention, softmax_scale)(*tensors) for _ in range(2))
    assert torch.equal(first, second)


def test_under_autocast_it_runs_in_the_autocast_dtype() -> None:
    tensors, softmax_scale = inputs(**SIZES["27 tokens, 5 cached"])
    half = [t.half() for t in tensors]
    half[5] = tensors[5]
    with torch.autocast("cpu", torch.float16):
        output = on(subset_attention, softmax_scale)(*tensors)
    assert output.dtype == torch.float16
    assert torch.equal(output, on(subset_attention, softmax_scale)(*half))


@pytest.mark.parametrize("normed", [True, False], ids=["QK norm", "no QK norm"])
@pytest.mark.parametrize("keep_cache", [True, False], ids=["cache kept", "cache dropped"])
def test_gradients_are_those_of_the_reference(keep_cache: bool, normed: bool) -> None:
    tensors, softmax_scale = inputs(K=3, T=4, P=2, d=16, normed=normed)
    tensors.append(normal(3, 6, seed=8).float())
    positions = [i for i, t in enumerate(tensors) if t is not None]

    def gradients(attention: Callable[..., tuple], *tensors: Tensor | None) -> Tensor:
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
        q, k, v, keys, values, head_scale, mask = leaves
        outputs = attention(q, k, v, (keys, values), head_scale, softmax_scale, mask)
        loss = sum((o * normal(*o.shape, seed=s, dtype=o.dtype)).sum() for s, o in enumerate(outputs) if o is not None)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [leaves[i] for i in positions])])

    def kernel(*arguments) -> tuple:
        return subset_attention(*arguments, keep_cache=keep_cache)

    def exact(*arguments) -> tuple:
        output, keys, values = reference.subset_attention(*arguments, None)
        return (output, keys, values) if keep_cache else (output,)

    expected, tolerance = exact_and_tolerance(lambda *t: gradients(exact, *t), *tensors)
    assert_close(gradients(kernel, *tensors), expected, tolerance)


def test_gradients_reach_queries_and_keys_also_with_room() -> None:
    (q, k, v, keys, values, head_scale), softmax_scale = inputs(K=3, T=3, P=2, d=16)
    room = roomy(keys, values, v, 8)
    past = room[0][:, :, :2], room[1][:, :, :2]
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    output, all_keys, _ = subset_attention(q, k, v, past, head_scale, softmax_scale, room=room)
    assert all_keys.data_ptr() == room[0].data_ptr()
    found = torch.autograd.grad(output.square().sum(), (q, k))
    output, _, _ = reference.subset_attention(q, k, v, (keys, values), head_scale, softmax_scale, None, None)
    torch.testing.assert_close(found, torch.autograd.grad(output.square().sum(), (q, k)))


def test_the_operators_pass_the_checks_of_torch() -> None:
    (q, k, v, keys, values, head_scale), softmax_scale = inputs(K=3, T=4, P=2, d=16)
    leaves, mask = [t.clone().requires_grad_() for t in (q, k, v)], normal(3, 6).float()
    room = tuple(part.nan_to_num() for part in roomy(keys, values, v, 8))  # the checks compare whole buffers
    operators = torch.ops.actvar_kernels
    torch.library.opcheck(
        operators.subset_attention.default, (*leaves, keys, values, 2, head_scale, softmax_scale, mask)
    )
    torch.library.opcheck(operators.subset_attention.default, (q, k, v, None, None, 0, None, 0.1, None))
    torch.library.opcheck(
        operators.subset_attention_append.default, (q, k, v, *room, 2, head_scale, softmax_scale, None)
    )


@pytest.mark.parametrize("with_room", [True, False], ids=["room", "no room"])
def test_compiled_it_does_what_it_does_eagerly(with_room: bool) -> None:
    tensors, softmax_scale = inputs(K=3, T=4, P=2, d=16)
    q, k, v, keys, values, head_scale = tensors

    def attention(q, k, v, past, room) -> tuple[Tensor, Tensor, Tensor]:
        return subset_attention(q, k, v, past, head_scale, softmax_scale, room=room)

    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    results = []
    for run in (attention, compiled):
        room = roomy(keys, values, v, 8) if with_room else None
        past = (keys, values) if room is None else (room[0][:, :, :2], room[1][:, :, :2])
        results.append(run(q, k, v, past, room))
        assert room is None or torch.equal(room[0][:, :, :6], results[-1][1])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("keep_cache", [True, False], ids=["cache kept", "cache dropped"])
def test_flops_are_those_of_every_query_with_every_key(keep_cache: bool) -> None:
    tensors, softmax_scale = inputs(K=3, T=4, P=2, d=16)
    operators = torch.ops.actvar_kernels
    mapping = dict.fromkeys((operators.subset_attention, operators.subset_attention_append), subset_attention_flops)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        on(subset_attention, softmax_scale, keep_cache=keep_cache)(*tensors)
    assert counter.get_total_flops() == 2 * 2 * R * H * 3 * (2 + 4) * 16


@pytest.mark.parametrize(("d", "dtype"), [(24, torch.float32), (64, torch.float64)], ids=["24 channels", "float64"])
def test_what_the_kernel_cannot_run_is_refused(d: int, dtype: torch.dtype) -> None:
    tensors, softmax_scale = inputs(K=2, T=2, P=0, d=d, dtype=dtype)
    with pytest.raises(BackendUnavailableError, match="subset_attention"):
        on(subset_attention, softmax_scale)(*tensors)
