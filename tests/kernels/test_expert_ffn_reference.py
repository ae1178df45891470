"""Routing and experts, values and gradients, against loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.kernel_loops import (
    EXACT,
    LOW_DTYPES,
    assert_close,
    gradients,
    leaves_of,
    looped_scatter,
    loops_in,
    normal,
    scatter_inputs,
)
from torch import Tensor
from torch.nn import functional as F

from actvar_kernels import expert_ffn, expert_ffn_scatter, route_experts
from actvar_kernels.expert_ffn.op import expert_ffn_flops

pytestmark = pytest.mark.usefixtures("reference_backend")


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


@pytest.mark.parametrize("schedule", ["auto", "dense", "tile_list"])
@pytest.mark.parametrize("of_all_tokens", [False, True], ids=["scattered", "of all tokens"])
def test_expert_ffn_scatter_is_the_loops_one_after_the_other(schedule: str, of_all_tokens: bool) -> None:
    tokens, keep = (5, 5) if of_all_tokens else (9, 5)
    (x, rows, u, gamma), index = scatter_inputs(2, tokens, 24, keep, torch.float64)
    weights, mask = ffn_weights(24, 96), random_mask(2, keep, 4, active=2)
    update = looped_experts(u, mask.double(), *weights)
    if of_all_tokens:
        index = [list(range(keep))] * 2
        actual = expert_ffn_scatter(None, None, rows, u, mask, 2, *weights, gamma, schedule)
    else:
        actual = expert_ffn_scatter(x.clone(), torch.tensor(index), rows, u, mask, 2, *weights, gamma, schedule)
    assert_close(actual, looped_scatter(x, index, rows, update, gamma), EXACT)


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
