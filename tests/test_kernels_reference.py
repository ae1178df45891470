"""The operations of the block one by one, values and gradients, against loops in float64.

Where an operation works in float64 throughout, it is held to 1e-12. Elsewhere the tolerance is four times the error of
the loops themselves when they run in the lower precision (`loops_in`): the order of a sum is not the same there, and a
few numbers do not show its largest error.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import actvar_kernels
from actvar_kernels import (
    BackendUnavailableError,
    add_normalize,
    add_normalize_route,
    expert_ffn,
    expert_ffn_scatter,
    get_backend,
    normalize_modulate,
    route_experts,
    scatter_rows,
    select_tokens,
    set_backend,
    subset_attention,
)
from actvar_kernels.expert_ffn.op import expert_ffn_flops
from actvar_kernels.expert_ffn.reference import snapped
from actvar_kernels.token_select.reference import top_indices

LOW_DTYPES = [torch.bfloat16, torch.float16]
EXACT = 1e-12
SHAPES = [(1, 1, 64, 1), (2, 16, 128, 12), (3, 25, 65, 19), (2, 7, 5, 1), (4, 9, 192, 9)]
"""Rows, tokens, width, kept tokens."""


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTVAR_BACKEND", raising=False)
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", "reference")


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loops_in(dtype: torch.dtype, loops: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, float]:
    """The loops in float64, and four times the error they have in `dtype`; the tensors are those of `dtype`."""
    exact = loops(*(None if t is None else t.double() for t in tensors))
    rough = loops(*(None if t is None else t.to(dtype) for t in tensors))
    return exact, 4 * (rough.double() - exact).abs().max().item()


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max().item()
    assert error <= tolerance, f"error {error:.3g}, allowed {tolerance:.3g}"


def gradients(output: Tensor, leaves: list[Tensor], seed: int = 99) -> list[Tensor]:
    """Gradients of the output weighted by fixed random numbers."""
    weights = normal(*output.shape, seed=seed).to(output.dtype)
    return list(torch.autograd.grad((output * weights).sum(), leaves))


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(True) for tensor in tensors]


def looped_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([oracle.linear(weight, bias, oracle.layer_norm(token))[0] for token in row]) for row in x]
    )


def looped_modulation(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([oracle.modulate(token, scale[row, 0], shift[row, 0]) for token in x[row]])
            for row in range(x.shape[0])
        ]
    )


def picked(x: Tensor, index: list[list[int]]) -> Tensor:
    return torch.stack([torch.stack([x[row, i] for i in kept]) for row, kept in enumerate(index)])


def selection_inputs(R: int, L: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias, scale, shift."""
    shapes = [(R, L, C), (1, C), (1,), (R, 1, C), (R, 1, C)]
    return [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_select_tokens_keeps_and_modulates_the_rows_that_the_loops_do(R: int, L: int, C: int, keep: int) -> None:
    x, weight, bias, scale, shift = selection_inputs(R, L, C)
    selection = select_tokens(x, weight, bias, scale, shift, keep)
    scores, tolerance = loops_in(torch.float32, looped_scores, x, weight, bias)
    index = [oracle.highest(row, keep) for row in scores.tolist()]
    assert selection.index.dtype == torch.int64
    assert selection.index.tolist() == index
    assert selection.scores.dtype == torch.float32
    assert_close(selection.scores, scores, tolerance)
    assert_close(selection.modulated, *loops_in(torch.float32, looped_modulation, picked(x, index), scale, shift))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_select_tokens_scores_low_precision_rows_in_float32_and_returns_them_in_their_dtype(
    dtype: torch.dtype,
) -> None:
    x, weight, bias, scale, shift = selection_inputs(3, 25, 128, dtype)
    selection = select_tokens(x, weight, bias, scale, shift, 19)
    assert selection.scores.dtype == torch.float32
    assert_close(selection.scores, *loops_in(torch.float32, looped_scores, x, weight, bias))
    assert selection.index.tolist() == [oracle.highest(row, 19) for row in selection.scores.tolist()]
    assert selection.modulated.dtype == dtype
    rows = picked(x, selection.index.tolist())
    assert_close(selection.modulated, *loops_in(dtype, looped_modulation, rows, scale, shift))


def test_autocast_changes_neither_scores_nor_logits() -> None:
    x, weight, bias, scale, shift = selection_inputs(2, 16, 128)
    router, router_bias = normal(16, 128, seed=9).float(), normal(16, seed=10).float()
    selection, (mask, logits) = (
        select_tokens(x, weight, bias, scale, shift, 12),
        route_experts(x, router, router_bias, 12),
    )
    with torch.autocast("cpu", torch.bfloat16):
        again = select_tokens(x, weight, bias, scale, shift, 12)
        mask_again, logits_again = route_experts(x, router, router_bias, 12)
    assert torch.equal(again.scores, selection.scores)
    assert torch.equal(again.index, selection.index)
    assert torch.equal(logits_again, logits)
    assert torch.equal(mask_again, mask)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_top_indices_breaks_any_tie_towards_the_lower_index(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    keep = data.draw(st.integers(1, length))
    row = st.lists(st.integers(-2, 2), min_size=length, max_size=length)
    scores = data.draw(st.lists(row, min_size=rows, max_size=rows))
    assert top_indices(torch.tensor(scores).float(), keep).tolist() == [oracle.highest(row, keep) for row in scores]


@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_select_tokens_keeps_the_first_tokens_under_a_constant_selector(R: int, L: int, C: int, keep: int) -> None:
    x, weight, bias, scale, shift = selection_inputs(R, L, C)
    selection = select_tokens(x, torch.zeros_like(weight), bias, scale, shift, keep)
    assert selection.index.tolist() == [list(range(keep))] * R


@pytest.mark.parametrize("C", [64, 1024])
@pytest.mark.parametrize("L", [16, 25, 169])
@pytest.mark.parametrize("R", [1, 3])
def test_equal_tokens_have_equal_scores_wherever_they_stand(R: int, L: int, C: int) -> None:
    x, weight, bias, scale, shift = selection_inputs(R, 1, C)
    selection = select_tokens(x.expand(R, L, C).contiguous(), weight, bias, scale, shift, L // 2)
    assert torch.equal(selection.scores, selection.scores[:, :1].expand(R, L))
    assert selection.index.tolist() == [list(range(L // 2))] * R


def test_under_shared_guidance_the_first_half_of_the_rows_decides() -> None:
    x, weight, bias, scale, shift = selection_inputs(4, 25, 64)
    alone = select_tokens(x, weight, bias, scale, shift, 10)
    shared = select_tokens(x, weight, bias, scale, shift, 10, share_guidance=True)
    assert not torch.equal(alone.index[2:], alone.index[:2])
    assert torch.equal(shared.index, alone.index[:2].repeat(2, 1))
    assert torch.equal(shared.scores, alone.scores)
    rows = picked(x, shared.index.tolist())
    modulated = loops_in(torch.float32, looped_modulation, rows, scale, shift)
    assert_close(shared.modulated, *modulated)


def test_a_token_without_variance_becomes_the_shift() -> None:
    x, weight, bias, scale, shift = selection_inputs(2, 4, 64)
    x = torch.full_like(x, 2.0)
    selection = select_tokens(x, weight, bias, scale, shift, 3)
    assert torch.equal(selection.modulated, shift.expand(2, 3, 64))
    assert torch.equal(selection.scores, bias.expand(2, 4))
    assert torch.equal(normalize_modulate(x, scale, shift), shift.expand(2, 4, 64))


def test_select_tokens_and_scatter_rows_take_tensors_that_are_not_contiguous() -> None:
    x, weight, bias, scale, shift = selection_inputs(2, 25, 64)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    expected = select_tokens(x, weight, bias, scale, shift, 19)
    actual = select_tokens(strided, weight, bias, scale, shift, 19)
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.modulated, expected.modulated)
    rows, update = normal(2, 19, 64, seed=8).float(), normal(2, 19, 64, seed=9).float()
    scattered = scatter_rows(strided, actual.index, rows, update, scale)
    assert torch.equal(scattered, scatter_rows(x, expected.index, rows, update, scale))


@pytest.mark.parametrize("experts", [0, 4])
def test_add_normalize_takes_the_rows_of_the_index(experts: int) -> None:
    x, update = normal(2, 9, 64), normal(2, 5, 64, seed=1)
    gamma, scale, shift = (normal(2, 1, 64, seed=seed) for seed in (2, 3, 4))
    index = [[8, 0, 3, 5, 1], [2, 7, 6, 4, 0]]
    router = normal(experts, 64, seed=5), normal(experts, seed=6)
    if experts:
        rows, u, mask, _ = add_normalize_route(x, torch.tensor(index), update, gamma, scale, shift, *router, 3)
        assert torch.equal(mask, route_experts(u, *router, 3)[0])
    else:
        rows, u = add_normalize(x, torch.tensor(index), update, gamma, scale, shift)
    for row in range(2):
        for place, token in enumerate(index[row]):
            exact = x[row, token] + gamma[row, 0] * update[row, place]
            assert_close(rows[row, place], exact, EXACT)
            assert_close(u[row, place], oracle.modulate(exact, scale[row, 0], shift[row, 0]), EXACT)


def test_the_gradient_of_the_rows_of_an_index_goes_to_where_they_came_from() -> None:
    x, update, zeros = normal(2, 5, 6), normal(2, 3, 6, seed=1), torch.zeros(2, 1, 6, dtype=torch.float64)
    index = torch.tensor([[4, 0, 2], [1, 2, 3]])

    def rows(x: Tensor) -> Tensor:
        return add_normalize(x, index, update, zeros, zeros, zeros)[0]

    (leaf,) = leaves_of(x)
    (gradient,) = gradients(rows(leaf), [leaf])
    (expected,) = gradients(picked(leaf, index.tolist()), [leaf])
    assert torch.equal(gradient, expected)
    assert torch.autograd.gradcheck(rows, [leaf])


def test_the_gradients_of_scores_and_modulated_rows_are_those_of_the_loops() -> None:
    tensors = selection_inputs(3, 9, 64)
    index = select_tokens(*tensors, 7).index.tolist()

    def loops(*tensors: Tensor) -> list[Tensor]:
        x, weight, bias, scale, shift = leaves = leaves_of(*tensors)
        modulated = looped_modulation(picked(x, index), scale, shift)
        output = torch.cat((looped_scores(x, weight, bias).flatten(), modulated.flatten()))
        return gradients(output, leaves)

    leaves = leaves_of(*tensors)
    selection = select_tokens(*leaves, 7)
    actual = gradients(torch.cat((selection.scores.flatten(), selection.modulated.flatten())), leaves)
    for part, gradient in enumerate(actual):
        exact, tolerance = loops_in(torch.float32, lambda *t, part=part: loops(*t)[part], *tensors)
        assert_close(gradient, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("R", "L", "C"), [(1, 1, 64), (3, 19, 65), (2, 5, 128)])
def test_normalize_modulate_is_the_loops(R: int, L: int, C: int, dtype: torch.dtype) -> None:
    x, _, _, scale, shift = selection_inputs(R, L, C, dtype)
    actual = normalize_modulate(x, scale, shift)
    assert actual.dtype == dtype
    assert_close(actual, *loops_in(dtype, looped_modulation, x, scale, shift))


def test_the_gradients_of_normalize_modulate_are_those_of_the_loops() -> None:
    x, _, _, scale, shift = selection_inputs(3, 9, 64)
    leaves = leaves_of(x, scale, shift)
    actual = gradients(normalize_modulate(*leaves), leaves)

    def loops(*tensors: Tensor) -> list[Tensor]:
        leaves = leaves_of(*tensors)
        return gradients(looped_modulation(*leaves), leaves)

    for part, gradient in enumerate(actual):
        exact, tolerance = loops_in(torch.float32, lambda *t, part=part: loops(*t)[part], x, scale, shift)
        assert_close(gradient, exact, tolerance)


def looped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    head_scale: Tensor | None,
    mask: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """Output, keys and values, flattened into one vector."""
    outputs, all_keys, all_values = [], [], []
    R, H, K, _ = q.shape
    for row in range(R):
        for head in range(H):
            keys = [] if past_k is None else list(past_k[row, head])
            values = [] if past_v is None else list(past_v[row, head])
            for key, value in zip(k[row, head], v[row, head], strict=True):
                keys.append(key if head_scale is None else key / key.norm())
                values.append(value)
            for query in range(K):
                vector = q[row, head, query]
                if head_scale is not None:
                    vector = vector / vector.norm() * head_scale[head]
                logits = torch.stack([softmax_scale * (vector * key).sum() for key in keys])
                if mask is not None:
                    logits = logits + mask[query]
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                outputs.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            all_keys.extend(keys)
            all_values.extend(values)
    d, T = q.shape[-1], len(keys)
    output = torch.stack(outputs).reshape(R, H, K, d).transpose(1, 2)
    cache = [torch.stack(part).reshape(R, H, T, d) for part in (all_keys, all_values)]
    return torch.cat([part.flatten() for part in (output, *cache)])


ATTENTION = {
    "first scale": dict(past=0, normed=True, masked=False, own=3),
    "with a past": dict(past=4, normed=True, masked=False, own=3),
    "keys of all tokens": dict(past=4, normed=True, masked=False, own=6),
    "no QK norm": dict(past=2, normed=False, masked=False, own=3),
    "masked": dict(past=0, normed=True, masked=True, own=5),
    "masked, with a past, no QK norm": dict(past=3, normed=False, masked=True, own=4),
}


def attention_inputs(
    past: int, normed: bool, masked: bool, own: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor | None], float]:
    """q, k, v, past keys, past values, head scales, mask; and the softmax scale."""
    R, H, K = 2, 2, 3
    shapes = [(R, H, K, head_dim), (R, H, own, head_dim), (R, H, own, head_dim)]
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    past_k = F.normalize(normal(R, H, past, head_dim, seed=3), dim=-1) if past else None
    past_v = normal(R, H, past, head_dim, seed=4) if past else None
    head_scale = torch.tensor([1.5, 4.0]) if normed else None
    mask = None
    if masked:
        mask = torch.zeros(K, past + own)
        mask[0, -2:] = mask[1, -1:] = -torch.inf
        mask[:, 0] = 0.5
    tensors = [None if t is None else t.to(dtype) for t in (q, k, v, past_k, past_v, head_scale, mask)]
    return tensors, 1.0 if normed else 0.25 / head_dim**0.5


def flat_attention(*tensors: Tensor | None, softmax_scale: float) -> Tensor:
    q, k, v, past_k, past_v, head_scale, mask = tensors
    past = None if past_k is None else (past_k, past_v)
    output, keys, values = subset_attention(q, k, v, past, head_scale, softmax_scale, mask)
    assert output.shape == (q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    assert output.dtype == keys.dtype == values.dtype == q.dtype
    return torch.cat([part.flatten() for part in (output, keys, values)])


@pytest.mark.parametrize("name", ATTENTION)
def test_subset_attention_in_float64_is_the_loops(name: str) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=64, dtype=torch.float64)
    actual = flat_attention(*tensors, softmax_scale=softmax_scale)
    assert_close(actual, looped_attention(*tensors, softmax_scale=softmax_scale), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_subset_attention_in_lower_precision_has_no_more_than_its_rounding(name: str, dtype: torch.dtype) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=64, dtype=dtype)
    exact, tolerance = loops_in(dtype, lambda *t: looped_attention(*t, softmax_scale=softmax_scale), *tensors)
    assert_close(flat_attention(*tensors, softmax_scale=softmax_scale), exact, tolerance)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_gradients_of_subset_attention_are_those_of_the_loops(name: str) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=4, dtype=torch.float64)
    *learned, mask = tensors

    def gradients_of(attention: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [None if t is None else t.clone().requires_grad_(True) for t in learned]
        output = attention(*inputs, mask, softmax_scale=softmax_scale)
        return gradients(output, [t for t in inputs if t is not None])

    for actual, exact in zip(gradients_of(flat_attention), gradients_of(looped_attention), strict=True):
        assert_close(actual, exact, EXACT)
    inputs = [None if t is None else t.clone().requires_grad_(True) for t in learned]
    assert torch.autograd.gradcheck(lambda *t: flat_attention(*t, mask, softmax_scale=softmax_scale), inputs)


def test_cached_keys_are_appended_to_and_not_normalised_again() -> None:
    tensors, softmax_scale = attention_inputs(4, True, False, 3, 64, torch.float32)
    q, k, v, past_k, past_v, head_scale, _ = tensors
    past_k = 3 * past_k
    _, keys, values = subset_attention(q, k, v, (past_k, past_v), head_scale, softmax_scale)
    assert torch.equal(keys[:, :, :4], past_k)
    assert torch.equal(values, torch.cat((past_v, v), dim=2))
    assert_close(keys[:, :, 4:].norm(dim=-1), torch.ones(2, 2, 3), 1e-6)


def looped_logits(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack([oracle.linear(weight, bias, token) for token in u.flatten(0, -2)]).unflatten(0, u.shape[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("experts", "active"), [(1, 1), (4, 3), (16, 12), (16, 1), (32, 32), (32, 24)])
def test_route_experts_turns_on_the_experts_that_the_loops_do(experts: int, active: int, dtype: torch.dtype) -> None:
    u = normal(3, 19, 64).to(dtype)
    weight, bias = normal(experts, 64, seed=1).to(dtype), normal(experts, seed=2).to(dtype)
    mask, logits = route_experts(u, weight, bias, active)
    exact, tolerance = loops_in(torch.float32, looped_logits, u, weight, bias)
    assert logits.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert_close(logits, exact, tolerance)
    for token_mask, token_logits in zip(mask.flatten(0, 1), exact.flatten(0, 1), strict=True):
        assert token_mask.nonzero().flatten().tolist() == oracle.highest(token_logits.tolist(), active)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(bias=st.lists(st.integers(-2, 2), min_size=1, max_size=32), data=st.data())
def test_route_experts_breaks_any_tie_towards_the_lower_expert(bias: list[int], data: st.DataObject) -> None:
    active = data.draw(st.integers(1, len(bias)))
    mask, logits = route_experts(
        normal(2, 5, 64).float(), torch.zeros(len(bias), 64), torch.tensor(bias).float(), active
    )
    assert logits.tolist() == [[bias] * 5] * 2
    first = oracle.highest(bias, active)
    assert mask.tolist() == [[[expert in first for expert in range(len(bias))]] * 5] * 2


def ffn_weights(C: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """fc1 weight and bias, fc2 weight and bias."""
    shapes = [((D, C), C**-0.5), ((D,), 0.3), ((C, D), D**-0.5), ((C,), 0.3)]
    return [normal(*shape, seed=20 + seed, std=std).to(dtype) for seed, (shape, std) in enumerate(shapes)]


def random_mask(*shape: int, active: int) -> Tensor:
    """A bool mask with `active` experts on per token."""
    order = normal(*shape, seed=30).argsort(dim=-1)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, order[..., :active], True)


def looped_experts(u: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
    """`b2` plus the sum over experts of gate times output, for float gates `[..., N]`."""
    names = ("ffn.fc1.weight", "ffn.fc1.bias", "ffn.fc2.weight", "ffn.fc2.bias")
    named = dict(zip(names, weights, strict=True))
    without_bias = {**named, "ffn.fc2.bias": torch.zeros_like(named["ffn.fc2.bias"])}
    tokens = []
    for token, own in zip(u.flatten(0, -2), gates.flatten(0, -2), strict=True):
        y = named["ffn.fc2.bias"]
        for expert in range(gates.shape[-1]):
            if own[expert] != 0:
                y = y + own[expert] * oracle.expert_ffn(without_bias, token, [expert], gates.shape[-1])
        tokens.append(y)
    return torch.stack(tokens).reshape(u.shape)


EXPERTS = [(1, 1), (4, 1), (4, 3), (16, 12), (16, 16), (32, 1), (32, 24)]
"""Experts and active experts."""


@pytest.mark.parametrize("gates", ["bool", "float"])
@pytest.mark.parametrize(("experts", "active"), EXPERTS)
def test_expert_ffn_in_float64_is_the_loops(experts: int, active: int, gates: str) -> None:
    u, weights = normal(2, 5, 24), ffn_weights(24, 96)
    mask = random_mask(2, 5, experts, active=active)
    if gates == "float":
        mask = mask * normal(2, 5, experts, seed=31)
    actual = expert_ffn(u, mask, active, *weights)
    assert_close(actual, looped_experts(u, mask.double(), *weights), EXACT)
    leaves = leaves_of(*weights)
    assert_close(expert_ffn(u, mask, active, *leaves).detach(), actual, EXACT)


def test_expert_ffn_with_every_expert_on_is_the_dense_ffn() -> None:
    u, weights = normal(2, 5, 24), ffn_weights(24, 96)
    dense = F.linear(F.gelu(F.linear(u, *weights[:2]), approximate="tanh"), *weights[2:])
    assert_close(expert_ffn(u, torch.ones(2, 5, 16, dtype=torch.bool), 16, *weights), dense, EXACT)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4)])
def test_expert_ffn_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    u, weights = normal(*shape, 24), ffn_weights(24, 96)
    mask = random_mask(*shape, 4, active=2)
    assert_close(expert_ffn(u, mask, 2, *weights), looped_experts(u, mask.double(), *weights), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("experts", "active"), EXPERTS)
def test_expert_ffn_in_lower_precision_has_no_more_error_than_the_dense_ffn(
    experts: int, active: int, dtype: torch.dtype
) -> None:
    u, weights = normal(2, 9, 64).to(dtype), ffn_weights(64, 256, dtype)
    mask = random_mask(2, 9, experts, active=active)
    hidden = F.gelu(F.linear(u, *weights[:2]), approximate="tanh")
    everything = torch.ones(2, 9, 1, dtype=torch.float64)
    in_float64 = [weight.double() for weight in weights]
    dense_error = F.linear(hidden, *weights[2:]).double() - looped_experts(u.double(), everything, *in_float64)
    actual = expert_ffn(u, mask, active, *weights)
    assert actual.dtype == dtype
    exact = looped_experts(u.double(), mask.double(), *in_float64)
    assert_close(actual, exact, 2 * dense_error.abs().max().item())


@pytest.mark.parametrize(("experts", "active"), [(1, 1), (4, 3), (16, 12)])
def test_the_gradients_of_expert_ffn_are_those_of_the_loops(experts: int, active: int) -> None:
    u, weights = normal(1, 3, 8), ffn_weights(8, 32)
    gates = random_mask(1, 3, experts, active=active) * normal(1, 3, experts, seed=31)

    def gradients_of(ffn: Callable[..., Tensor], *middle: int) -> list[Tensor]:
        leaves = leaves_of(u, gates, *weights)
        result = gradients(ffn(*leaves[:2], *middle, *leaves[2:]), leaves)
        result[1] = result[1] * (gates != 0)  # the loops do not visit an expert that is off
        return result

    actual = gradients_of(expert_ffn, active)
    for gradient, exact in zip(actual, gradients_of(looped_experts), strict=True):
        assert_close(gradient, exact, EXACT)
    leaves = leaves_of(u, gates, *weights)
    assert torch.autograd.gradcheck(lambda u, gates, *w: expert_ffn(u, gates, active, *w), leaves)
    mask = gates != 0
    leaves = leaves_of(u, *weights)
    assert torch.autograd.gradcheck(lambda u, *w: expert_ffn(u, mask, active, *w), leaves)


@pytest.mark.parametrize(("shape", "experts", "active"), [((2, 3), 4, 3), ((5,), 16, 12), ((1, 2, 2), 1, 1)])
def test_expert_ffn_flops_are_two_per_multiply_add_of_a_chosen_expert(
    shape: tuple[int, ...], experts: int, active: int
) -> None:
    C, D = 8, 32
    mask = random_mask(*shape, experts, active=active)
    multiply_adds = 0
    for token in mask.flatten(0, -2):
        for _expert in token.nonzero().flatten().tolist():
            for _hidden_unit in range(D // experts):
                multiply_adds += C  # its row of fc1
                multiply_adds += C  # its column of fc2
    shapes = [(D, C), (D,), (C, D), (C,)]
    assert expert_ffn_flops((*shape, C), tuple(mask.shape), active, *shapes) == 2 * multiply_adds


def looped_scatter(x: Tensor, index: list[list[int]], rows: Tensor, update: Tensor, gamma: Tensor) -> Tensor:
    out = [list(row) for row in x]
    for row, kept in enumerate(index):
        for position, token in enumerate(kept):
            out[row][token] = rows[row, position] + gamma[row, 0] * update[row, position]
    return torch.stack([torch.stack(row) for row in out])


def scatter_inputs(R: int, L: int, C: int, keep: int, dtype: torch.dtype) -> tuple[list[Tensor], list[list[int]]]:
    """x, rows, update, gamma; and the index."""
    shapes = [(R, L, C), (R, keep, C), (R, keep, C), (R, 1, C)]
    tensors = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    return tensors, normal(R, L, seed=9).argsort(dim=1)[:, :keep].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_scatter_rows_updates_the_kept_rows_of_a_copy(R: int, L: int, C: int, keep: int, dtype: torch.dtype) -> None:
    (x, rows, update, gamma), index = scatter_inputs(R, L, C, keep, dtype)
    before = x.clone()
    out = scatter_rows(x, torch.tensor(index), rows, update, gamma)
    assert torch.equal(x, before)
    assert out.dtype == dtype
    exact, tolerance = loops_in(dtype, lambda *t: looped_scatter(t[0], index, *t[1:]), x, rows, update, gamma)
    assert_close(out, exact, EXACT if dtype == torch.float64 else tolerance)
    untouched = torch.ones(R, L, dtype=torch.bool).scatter_(1, torch.tensor(index), False)
    assert torch.equal(out[untouched], x[untouched])


def test_the_gradients_of_scatter_rows_are_those_of_the_loops() -> None:
    tensors, index = scatter_inputs(2, 5, 4, 3, torch.float64)

    def scatter(x: Tensor, rows: Tensor, update: Tensor, gamma: Tensor) -> Tensor:
        return scatter_rows(x, torch.tensor(index), rows, update, gamma)

    leaves = leaves_of(*tensors)
    actual, expected = (
        gradients(output, leaves) for output in (scatter(*leaves), looped_scatter(leaves[0], index, *leaves[1:]))
    )
    for gradient, exact in zip(actual, expected, strict=True):
        assert_close(gradient, exact, EXACT)
    assert torch.autograd.gradcheck(scatter, leaves)


def gray_decoded(experts: list[bool]) -> int:
    number = parity = 0
    for on in experts:
        parity ^= on
        number = 2 * number + parity
    return number


def looped_snap(masks: list[list[bool]], active: int) -> list[list[bool]]:
    order = sorted(range(len(masks)), key=lambda token: (token // 4096, gray_decoded(masks[token])))
    result = {}
    for start in range(0, len(order), 128):
        tile = order[start : start + 128]
        votes = [sum(masks[token][expert] for token in tile) for expert in range(len(masks[0]))]
        run = oracle.highest(votes, active)
        result.update({token: [expert in run for expert in range(len(votes))] for token in tile})
    return [result[token] for token in range(len(masks))]


@pytest.mark.parametrize(("tokens", "experts", "active"), [(1, 4, 3), (300, 1, 1), (300, 5, 2), (4400, 6, 4)])
def test_snap_gives_every_tile_of_sorted_tokens_the_experts_of_most_votes(
    tokens: int, experts: int, active: int
) -> None:
    mask = random_mask(tokens, experts, active=active)
    assert snapped(mask, active).tolist() == looped_snap(mask.tolist(), active)
    equal = mask[:1].expand(tokens, experts)
    assert torch.equal(snapped(equal, active), equal)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_snap_breaks_any_tie_towards_the_lower_expert(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 32))
    tokens = data.draw(st.lists(st.lists(st.booleans(), min_size=experts, max_size=experts), min_size=1, max_size=9))
    active = data.draw(st.integers(1, experts))
    assert snapped(torch.tensor(tokens), active).tolist() == looped_snap(tokens, active)


@pytest.mark.parametrize("schedule", ["auto", "dense", "tile_list", "snap"])
@pytest.mark.parametrize("of_all_tokens", [False, True], ids=["scattered", "of all tokens"])
def test_expert_ffn_scatter_is_the_loops_one_after_the_other(schedule: str, of_all_tokens: bool) -> None:
    tokens, keep = (5, 5) if of_all_tokens else (9, 5)
    (x, rows, u, gamma), index = scatter_inputs(2, tokens, 24, keep, torch.float64)
    weights, mask = ffn_weights(24, 96), random_mask(2, keep, 4, active=2)
    run = torch.tensor(looped_snap(mask.flatten(0, 1).tolist(), 2)).view_as(mask) if schedule == "snap" else mask
    update = looped_experts(u, run.double(), *weights)
    if of_all_tokens:
        index = [list(range(keep))] * 2
        actual = expert_ffn_scatter(None, None, rows, u, mask, 2, *weights, gamma, schedule)
    else:
        actual = expert_ffn_scatter(x.clone(), torch.tensor(index), rows, u, mask, 2, *weights, gamma, schedule)
    assert_close(actual, looped_scatter(x, index, rows, update, gamma), EXACT)


def test_an_unknown_schedule_is_a_value_error() -> None:
    operation, arguments = OPERATIONS["expert_ffn_scatter"]
    with pytest.raises(ValueError, match=r"^schedule: expected one of auto, .*'fastest'"):
        operation(**arguments, schedule="fastest")


R, L, K, C, N, D = 2, 9, 5, 64, 4, 256
OPERATIONS: dict[str, tuple[Callable, dict[str, object]]] = {
    "select_tokens": (
        select_tokens,
        dict(
            x=torch.ones(R, L, C),
            weight=torch.ones(1, C),
            bias=torch.ones(1),
            scale=torch.ones(R, 1, C),
            shift=torch.ones(R, 1, C),
            keep=K,
        ),
    ),
    "normalize_modulate": (
        normalize_modulate,
        dict(x=torch.ones(R, L, C), scale=torch.ones(R, 1, C), shift=torch.ones(R, 1, C)),
    ),
    "add_normalize": (
        add_normalize,
        dict(
            x=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            update=torch.ones(R, K, C),
            gamma=torch.ones(R, 1, C),
            scale=torch.ones(R, 1, C),
            shift=torch.ones(R, 1, C),
        ),
    ),
    "subset_attention": (
        subset_attention,
        dict(
            q=torch.ones(R, 2, K, 32),
            k=torch.ones(R, 2, L, 32),
            v=torch.ones(R, 2, L, 32),
            past=(torch.ones(R, 2, 3, 32), torch.ones(R, 2, 3, 32)),
            head_scale=torch.ones(2),
            softmax_scale=1.0,
            mask=torch.zeros(K, 3 + L),
        ),
    ),
    "route_experts": (
        route_experts,
        dict(u=torch.ones(R, K, C), weight=torch.ones(N, C), bias=torch.ones(N), active=3),
    ),
    "expert_ffn": (
        expert_ffn,
        dict(
            u=torch.ones(R, K, C),
            mask=torch.ones(R, K, N, dtype=torch.bool),
            active=3,
            fc1_weight=torch.ones(D, C),
            fc1_bias=torch.ones(D),
            fc2_weight=torch.ones(C, D),
            fc2_bias=torch.ones(C),
        ),
    ),
    "expert_ffn_scatter": (
        expert_ffn_scatter,
        dict(
            rest=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            rows=torch.ones(R, K, C),
            u=torch.ones(R, K, C),
            mask=torch.ones(R, K, N, dtype=torch.bool),
            active=3,
            fc1_weight=torch.ones(D, C),
            fc1_bias=torch.ones(D),
            fc2_weight=torch.ones(C, D),
            fc2_bias=torch.ones(C),
            gamma=torch.ones(R, 1, C),
        ),
    ),
    "scatter_rows": (
        scatter_rows,
        dict(
            rest=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            rows=torch.ones(R, K, C),
            update=torch.ones(R, K, C),
            gamma=torch.ones(R, 1, C),
        ),
    ),
}
WRONG = [
    ("select_tokens", "x", torch.ones(L, C)),
    ("select_tokens", "weight", torch.ones(2, C)),
    ("select_tokens", "weight", torch.ones(C)),
    ("select_tokens", "bias", torch.ones(2)),
    ("select_tokens", "scale", torch.ones(R, C)),
    ("select_tokens", "shift", torch.ones(1, 1, C)),
    ("select_tokens", "keep", 0),
    ("select_tokens", "keep", L + 1),
    ("add_normalize", "x", torch.ones(L, C)),
    ("add_normalize", "index", torch.arange(K)),
    ("add_normalize", "update", torch.ones(R, L, C)),
    ("add_normalize", "gamma", torch.ones(R, C)),
    ("normalize_modulate", "x", torch.ones(L, C)),
    ("normalize_modulate", "scale", torch.ones(R, 1, C + 1)),
    ("normalize_modulate", "shift", torch.ones(R, 2, C)),
    ("subset_attention", "q", torch.ones(R, K, 64)),
    ("subset_attention", "k", torch.ones(R, 2, L, 16)),
    ("subset_attention", "v", torch.ones(R, 2, L + 1, 32)),
    ("subset_attention", "past keys", (torch.ones(R, 3, 3, 32), torch.ones(R, 3, 3, 32))),
    ("subset_attention", "past values", (torch.ones(R, 2, 3, 32), torch.ones(R, 2, 4, 32))),
    ("subset_attention", "head_scale", torch.ones(1, 2, 1, 1)),
    ("subset_attention", "mask", torch.zeros(K, L)),
    ("route_experts", "weight", torch.ones(N, C + 1)),
    ("route_experts", "bias", torch.ones(N + 1)),
    ("route_experts", "active", 0),
    ("route_experts", "active", N + 1),
    ("expert_ffn", "u", torch.ones(R, K, C + 1)),
    ("expert_ffn", "mask", torch.ones(R, K - 1, N, dtype=torch.bool)),
    ("expert_ffn", "mask", torch.ones(R * K, N, dtype=torch.bool)),
    ("expert_ffn", "mask", torch.ones(R, K, 3, dtype=torch.bool)),
    ("expert_ffn", "active", 0),
    ("expert_ffn", "active", N + 1),
    ("expert_ffn", "fc1_bias", torch.ones(1)),
    ("expert_ffn", "fc2_weight", torch.ones(D, C)),
    ("expert_ffn", "fc2_bias", torch.ones(1)),
    ("expert_ffn_scatter", "rest", torch.ones(R, L, C + 1)),
    ("expert_ffn_scatter", "index", torch.arange(K)),
    ("expert_ffn_scatter", "rows", torch.ones(R, L, C)),
    ("expert_ffn_scatter", "u", torch.ones(R, K, C + 1)),
    ("expert_ffn_scatter", "mask", torch.ones(R, K, 3, dtype=torch.bool)),
    ("expert_ffn_scatter", "active", N + 1),
    ("expert_ffn_scatter", "fc1_bias", torch.ones(1)),
    ("expert_ffn_scatter", "gamma", torch.ones(R, C)),
    ("scatter_rows", "rest", torch.ones(L, C)),
    ("scatter_rows", "index", torch.arange(K)),
    ("scatter_rows", "rows", torch.ones(R, L, C)),
    ("scatter_rows", "update", torch.ones(R, K, 1)),
    ("scatter_rows", "gamma", torch.ones(R, C)),
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_what_its_error_cases_are_made_from(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    operation(**arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    WRONG,
    ids=[f"{name} {argument} {list(v.shape) if isinstance(v, Tensor) else ''}" for name, argument, v in WRONG],
)
def test_an_argument_that_does_not_fit_is_named_in_a_value_error(name: str, argument: str, value: object) -> None:
    operation, arguments = OPERATIONS[name]
    with pytest.raises(ValueError, match=f"^{argument}: expected|^{argument}: the number of experts must divide"):
        operation(**{**arguments, argument.split()[0]: value})


def test_shared_guidance_needs_an_even_number_of_rows() -> None:
    x, weight, bias, scale, shift = selection_inputs(3, 9, 64)
    with pytest.raises(ValueError, match=r"^share_guidance: .* 3 rows"):
        select_tokens(x, weight, bias, scale, shift, 5, share_guidance=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backend_asked_for_by_name_raises_at_the_call_where_it_cannot_run(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    set_backend("triton")
    with pytest.raises(BackendUnavailableError, match=f"^{name}: the 'triton' backend needs"):
        operation(**arguments)


def test_a_backend_asked_for_by_name_raises_also_where_gradients_are_wanted() -> None:
    _, arguments = OPERATIONS["expert_ffn"]
    arguments = {**arguments, "u": arguments["u"].clone().requires_grad_(True)}
    set_backend("triton")
    with pytest.raises(BackendUnavailableError, match=r"^expert_ffn: the 'triton' backend needs"):
        expert_ffn(**arguments)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_can_be_asked_for_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, arguments = OPERATIONS[name]
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    monkeypatch.setenv("ACTVAR_BACKEND", "reference")
    assert get_backend() == "reference"
    operation(**arguments)


def test_an_unknown_backend_is_a_value_error_that_changes_nothing() -> None:
    with pytest.raises(ValueError, match=r"set_backend: .*'cuda'"):
        set_backend("cuda")
    assert get_backend() == "reference"


def test_the_environment_chooses_the_backend_until_the_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    assert get_backend() == "auto"
    monkeypatch.setenv("ACTVAR_BACKEND", "triton")
    assert get_backend() == "triton"
    operation, arguments = OPERATIONS["scatter_rows"]
    with pytest.raises(BackendUnavailableError, match=r"^scatter_rows: the 'triton' backend needs"):
        operation(**arguments)
    set_backend("auto")
    assert get_backend() == "auto"
    operation(**arguments)


def test_an_unknown_backend_in_the_environment_is_a_value_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    monkeypatch.setenv("ACTVAR_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"ACTVAR_BACKEND: .*'fastest'"):
        get_backend()
    operation, arguments = OPERATIONS["route_experts"]
    with pytest.raises(ValueError, match="ACTVAR_BACKEND"):
        operation(**arguments)


LAYOUTS = {
    "contiguous": lambda u: u,
    "a slice": lambda u: torch.cat((u, u), dim=1)[:, : u.shape[1]],
    "every other channel": lambda u: u.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda u: u.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=["bool mask", "float gates"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_expert_ffn_operator_passes_the_checks_of_torch(layout: str, mask_dtype: torch.dtype) -> None:
    u, weights = LAYOUTS[layout](normal(2, 5, 32).float()), ffn_weights(32, 64, torch.float32)
    mask = random_mask(2, 5, 4, active=3).to(mask_dtype)
    torch.library.opcheck(torch.ops.actvar_kernels.expert_ffn.default, (u, mask, 3, *weights))


def test_expert_ffn_under_autocast_gives_the_same_dtype_when_compiled() -> None:
    u, weights = normal(2, 5, 32).float(), ffn_weights(32, 64, torch.float32)
    mask = random_mask(2, 5, 4, active=3)

    def ffn(u: Tensor) -> Tensor:
        return expert_ffn(u, mask, 3, *weights)

    with torch.autocast("cpu", torch.bfloat16):
        eager = ffn(u)
        compiled = torch.compile(ffn, backend="aot_eager", fullgraph=True)(u)
    assert eager.dtype == torch.bfloat16
    assert compiled.dtype == eager.dtype
    assert torch.equal(compiled, eager)
