"""Selection of tokens, values and gradients, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.kernel_loops import (
    LOW_DTYPES,
    SHAPES,
    assert_close,
    gradients,
    leaves_of,
    looped_modulation,
    loops_in,
    normal,
    picked,
    selection_inputs,
)
from torch import Tensor

from actvar_kernels import normalize_modulate, route_experts, scatter_rows, select_tokens
from actvar_kernels.token_select.reference import top_indices

pytestmark = pytest.mark.usefixtures("reference_backend")


def looped_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([oracle.linear(weight, bias, oracle.layer_norm(token))[0] for token in row]) for row in x]
    )


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
