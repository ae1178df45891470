"""Token selection and LayerNorm with modulation on Triton against float64, and against the reference at ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor
from torch.nn import functional as F

from actvar_kernels import BackendUnavailableError, normalize_modulate, select_tokens
from actvar_kernels.token_select import reference, triton_kernel
from actvar_kernels.triton_backend.tiles import RowTiles, SelectTiles

DTYPES = [torch.float32, torch.float16]
SHAPES = [(1, 1, 20, 1), (2, 16, 192, 12), (3, 25, 65, 1), (2, 7, 20, 7)]
"""Rows, tokens, width, kept tokens."""


@pytest.fixture(autouse=True, params=["two launches", "three launches"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Four rows a tile, and two tiles that share a ranking; a test may set other numbers."""
    if request.param == "three launches":
        monkeypatch.setattr(triton_kernel, "RANKED_TOKENS", 0)

    def choose(rows: int, steps: int) -> None:
        chosen = SelectTiles(rows, warps=4, steps=steps)
        monkeypatch.setattr(triton_kernel, "select_tiles", lambda *_: chosen)
        monkeypatch.setattr(triton_kernel, "row_tiles", lambda tokens, width: RowTiles(rows, warps=4))
        monkeypatch.setattr(triton_kernel, "score_tiles", lambda width: RowTiles(rows, warps=4))

    choose(4, 2)
    return choose


def inputs(R: int, L: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias; scale and shift as a block has them, views of one tensor."""
    x, weight, bias = normal(R, L, C, dtype=dtype), normal(1, C, seed=1, dtype=dtype), normal(1, seed=2, dtype=dtype)
    modulation = normal(R, 1, 6, C, seed=3, dtype=dtype).unbind(2)
    return [x, weight, bias, modulation[2], modulation[4]]


def exact_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (F.layer_norm(x.double(), x.shape[-1:], eps=1e-6) * weight.double()).sum(dim=-1) + bias.double()


def score_tolerance(x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Four times the reference's error."""
    nothing = torch.zeros(x.shape[0], 1, x.shape[2])
    scores = reference.select_tokens(x, weight, bias, nothing, nothing, 1, False)[2]
    return 4 * (scores - exact_scores(x, weight, bias)).abs().max().item()


def picked(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([x[row, kept] for row, kept in enumerate(index.tolist())])


def assert_selects(selection: tuple[Tensor, ...], index: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """The rows of `index` are where they belong, and so are the others."""
    assert selection.index.dtype == torch.int64
    assert selection.index.tolist() == index.tolist()
    assert selection.modulated.dtype == x.dtype
    exact = exact_and_tolerance(reference.normalize_modulate, picked(x, index), scale, shift)
    assert_close(selection.modulated, *exact)
    dropped = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(selection.rest[dropped], x[dropped])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_select_tokens_in_any_grid_order(
    R: int, L: int, C: int, keep: int, dtype: torch.dtype, grid_order: str
) -> None:
    x, weight, bias, scale, shift = inputs(R, L, C, dtype)
    selection = select_tokens(x, weight, bias, scale, shift, keep)
    exact = exact_scores(x, weight, bias)
    assert selection.scores.dtype == torch.float32
    assert_close(selection.scores, exact, score_tolerance(x, weight, bias))
    assert_selects(selection, reference.top_indices(exact, keep), x, scale, shift)


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (2, 3), (16, 1)])
def test_the_tiles_do_not_change_what_is_kept(rows: int, steps: int, tiles: Callable[[int, int], None]) -> None:
    x, weight, bias, scale, shift = inputs(1, 13, 20)
    tiles(rows, steps)
    selection = select_tokens(x, weight, bias, scale, shift, 9)
    assert_selects(selection, reference.top_indices(exact_scores(x, weight, bias), 9), x, scale, shift)


@pytest.mark.parametrize(("L", "keep"), [(1024, 768), (1025, 1024), (4107, 2054)])
def test_select_tokens_of_long_sequences(L: int, keep: int, tiles: Callable[[int, int], None]) -> None:
    x, weight, bias, scale, shift = inputs(1, L, 5)
    tiles(256, 2)
    selection = select_tokens(x, weight, bias, scale, shift, keep)
    assert_selects(selection, reference.top_indices(selection.scores, keep), x, scale, shift)


@pytest.mark.parametrize("keep", [1, 5, 12, 21])
def test_equal_rows_score_equally_and_the_lower_index_is_kept(keep: int) -> None:
    x, weight, bias, scale, shift = inputs(2, 21, 192)
    which = torch.arange(21) * 5 % 3
    x = x[:, which]
    selection = select_tokens(x, weight, bias, scale, shift, keep)
    for row in range(2):
        for value in range(3):
            assert len(selection.scores[row, which == value].unique()) == 1
    assert selection.index.tolist() == reference.top_indices(selection.scores, keep).tolist()


@triton.jit
def _store_places(scores_ptr, places_ptr, length, keep, BLOCK_L: tl.constexpr):
    index = tl.arange(0, BLOCK_L)
    tl.store(places_ptr + index, triton_kernel._places(scores_ptr, length, keep, BLOCK_L), mask=index < length)


INF, NAN = float("inf"), float("nan")
SCORES = {
    "one": [3.0],
    "all equal": [0.5] * 11,
    "zeros of both signs": [0.0, -0.0, 1.0, -0.0, 0.0, -1.0],
    "infinities": [INF, -INF, 0.0, INF, -INF, -INF],
    "nan above infinity": [1.0, NAN, INF, -NAN, 2.0, NAN, -INF],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, -1.0 - 2**-23, 1.0, 2.0**-140, -(2.0**-140)],
    "longest, with ties": normal(1024, std=20).round().tolist(),
    "300 of 512": normal(300, std=50).round().tolist(),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_ranked_as_by_a_stable_descending_sort(name: str) -> None:
    scores = torch.tensor(SCORES[name])
    L = len(scores)
    for keep in {1, (L + 1) // 2, max(1, L - 1), L}:
        places = torch.empty(L, dtype=torch.int32)
        _store_places[(1,)](scores, places, L, keep, triton.next_power_of_2(L))
        kept, left = (places < keep).nonzero().flatten(), (places >= keep).nonzero().flatten()
        assert kept.tolist() == reference.top_indices(scores, keep).tolist()
        assert places[kept].tolist() == list(range(keep))
        assert places[left].tolist() == list(range(keep, L))


def test_nan_in_one_sequence_leaves_the_others_alone_and_ranks_first_in_its_own() -> None:
    x, weight, bias, scale, shift = inputs(3, 9, 20)
    clean = select_tokens(x, weight, bias, scale, shift, 4)
    x = x.clone()
    x[1, 6] = NAN
    selection = select_tokens(x, weight, bias, scale, shift, 4)
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(selection[:3], clean[:3], strict=True))
    assert selection.scores[1].isnan().tolist() == [i == 6 for i in range(9)]
    assert 6 in selection.index[1].tolist()
    assert selection.index.tolist() == reference.top_indices(selection.scores, 4).tolist()


def test_with_shared_guidance_the_conditional_half_decides(grid_order: str) -> None:
    x, weight, bias, scale, shift = inputs(4, 9, 20)
    selection = select_tokens(x, weight, bias, scale, shift, 5, share_guidance=True)
    exact = exact_scores(x, weight, bias)
    assert_close(selection.scores, exact, score_tolerance(x, weight, bias))
    assert_selects(selection, reference.top_indices(exact[:2], 5).repeat(2, 1), x, scale, shift)


VIEWS = {
    "a scale of a longer sequence": lambda x: torch.cat((x * NAN, x, x * NAN), dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "tokens before rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other channel": lambda x: torch.stack((x, x * NAN), dim=-1)[..., 0],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_give_what_copies_give(name: str) -> None:
    x, weight, bias, scale, shift = inputs(2, 9, 20)
    view = VIEWS[name](x)
    selection = select_tokens(view, weight, bias, scale, shift, 5)
    copied = select_tokens(view.contiguous(), weight, bias, scale.clone(), shift.clone(), 5)
    assert all(torch.equal(a, b) for a, b in zip(selection[:3], copied[:3], strict=True))
    assert torch.equal(normalize_modulate(view, scale, shift), normalize_modulate(view.contiguous(), scale, shift))


def test_bfloat16_rows_are_scored_in_float32_and_rounded_once() -> None:
    x, weight, bias, scale, shift = inputs(2, 9, 192, torch.bfloat16)
    selection = select_tokens(x, weight, bias, scale, shift, 5)
    assert_close(selection.scores, exact_scores(x, weight, bias), score_tolerance(x, weight, bias))
    index = reference.top_indices(selection.scores, 5)
    modulated = reference.normalize_modulate(picked(x, index).double(), scale.double(), shift.double())
    # the interpreter cuts bfloat16 off where a GPU rounds it: an error of up to 2^-7 instead of 2^-8
    assert ((selection.modulated.double() - modulated).abs() <= 2**-7 * modulated.abs() + 1e-5).all()


def test_in_place_nothing_is_copied_and_the_result_is_the_same(grid_order: str) -> None:
    x, weight, bias, scale, shift = inputs(2, 13, 20)
    before = x.clone()
    expected = select_tokens(x, weight, bias, scale, shift, 5)
    with torch.no_grad():
        selection = select_tokens(x, weight, bias, scale, shift, 5, in_place=True)
    assert selection.rest is x
    assert torch.equal(x, before)
    assert all(map(torch.equal, selection[:3], expected[:3]))


def test_in_place_is_not_for_gradients_nor_for_channels_apart() -> None:
    x, weight, bias, scale, shift = inputs(2, 13, 20)
    assert select_tokens(x.requires_grad_(), weight, bias, scale, shift, 5, in_place=True).rest is not x
    with torch.no_grad():
        apart = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert select_tokens(apart, weight, bias, scale, shift, 5, in_place=True).rest is not apart


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_normalize_modulate_in_any_grid_order(
    R: int, L: int, C: int, keep: int, dtype: torch.dtype, grid_order: str
) -> None:
    x, _, _, scale, shift = inputs(R, L, C, dtype)
    out = normalize_modulate(x, scale, shift)
    assert out.dtype == dtype
    assert_close(out, *exact_and_tolerance(reference.normalize_modulate, x, scale, shift))


def test_guidance_takes_conditional_and_unconditional_rows_together(grid_order) -> None:
    x, scale, shift = (
        normal(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate([(6, 5, 20), *[(6, 1, 20)] * 2])
    )
    out = normalize_modulate(x, scale, shift, 1.5)
    assert out.shape == (3, 5, 20)
    assert_close(out, *exact_and_tolerance(lambda *t: reference.normalize_modulate(*t, 1.5), x, scale, shift))
    y = normalize_modulate(x, scale, shift)
    torch.testing.assert_close(out, 2.5 * y[:3] - 1.5 * y[3:])
    torch.library.opcheck(torch.ops.actvar_kernels.normalize_modulate.default, (x, scale, shift, 1.5))
    with pytest.raises(ValueError, match="x: expected conditional and unconditional rows"):
        normalize_modulate(x[:5], scale[:5], shift[:5], 1.5)


def test_normalize_modulate_of_float32_rows_with_modulation_in_half_precision() -> None:
    x, _, _, scale, shift = inputs(2, 5, 20)
    scale, shift = scale.half(), shift.half()
    out = normalize_modulate(x, scale, shift)
    assert out.dtype == torch.float32
    assert_close(out, *exact_and_tolerance(reference.normalize_modulate, x, scale, shift))


def test_normalize_modulate_of_rows_far_from_zero() -> None:
    x, _, _, scale, shift = inputs(2, 5, 192)
    assert_close(
        normalize_modulate(x + 300, scale, shift),
        *exact_and_tolerance(reference.normalize_modulate, x + 300, scale, shift),
    )


def test_the_operators_pass_the_checks_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # the checks compare all outputs, also the rows of `rest` that have no value
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)
    x, weight, bias, scale, shift = (t.requires_grad_() for t in inputs(2, 4, 8))
    operators = torch.ops.actvar_kernels
    for in_place in (False, True):
        arguments = (x, weight, bias, scale, shift) if not in_place else inputs(2, 4, 8)
        torch.library.opcheck(operators.select_tokens.default, (*arguments, 3, True, in_place))
    for guidance in (None, 1.5):
        torch.library.opcheck(operators.normalize_modulate.default, (x, scale, shift, guidance))


def test_a_compiled_call_gives_the_same() -> None:
    x, weight, bias, scale, shift = inputs(2, 4, 8)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> tuple[Tensor, ...]:
        return (*select_tokens(x, weight, bias, scale, shift, 3)[:3], normalize_modulate(x, scale, shift))

    eager = (*select_tokens(x, weight, bias, scale, shift, 3)[:3], normalize_modulate(x, scale, shift))
    assert all(map(torch.equal, compiled(x), eager))


def gradients(function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> list[Tensor]:
    """Of the outputs that have one, weighted by fixed random numbers."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = [output for output in function(*leaves) if output.requires_grad]
    weights = [normal(*output.shape, seed=99 + i, dtype=output.dtype) for i, output in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, leaves, weights))


def test_the_gradients_are_those_of_the_reference_at_the_rows_that_were_kept() -> None:
    tensors = inputs(2, 6, 20)
    tensors[0][:, 3] = tensors[0][:, 1]

    def of_dropped_rows(selection: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index, modulated, scores, rest = selection
        dropped = torch.ones(rest.shape[:2], dtype=torch.bool).scatter(1, index, False)
        return modulated, scores, rest[dropped]

    actual = gradients(lambda *t: of_dropped_rows(select_tokens(*t, 4)), tensors)
    expected = gradients(lambda *t: of_dropped_rows(reference.select_tokens(*t, 4, False)), tensors)
    assert all(map(torch.equal, actual, expected))
    x, _, _, scale, shift = tensors
    actual = gradients(lambda *t: (normalize_modulate(*t),), [x, scale, shift])
    expected = gradients(lambda *t: (reference.normalize_modulate(*t),), [x, scale, shift])
    assert all(map(torch.equal, actual, expected))


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    x, weight, bias, scale, shift = inputs(2, 4, 8)
    weight.requires_grad_()
    select_tokens(x, weight, bias, scale, shift, 3).scores.sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_what_triton_cannot_run_raises_when_it_is_asked_for_by_name() -> None:
    x, weight, bias, scale, shift = inputs(1, 8193, 4)
    with pytest.raises(BackendUnavailableError, match=r"select_tokens .*up to 8192 tokens"):
        select_tokens(x, weight, bias, scale, shift, 3)
    with pytest.raises(BackendUnavailableError, match=r"normalize_modulate .*float32, float16 and bfloat16"):
        normalize_modulate(x.double(), scale, shift)
