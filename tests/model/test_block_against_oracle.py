"""The patched block against the float64 oracle: block by block, over sequences with the K/V cache, teacher forced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import oracle
from support.oracle_cases import (
    ALONE,
    CASES,
    DEPTH,
    DTYPES,
    IN_A_ROW,
    KINDS,
    LOW_DTYPES,
    MODES,
    TEACHER_FORCED,
    Case,
    as_chosen,
    assert_close,
    assert_same_choices,
    choose_by,
    gates_of,
    inputs_of,
    largest_errors,
    model_of,
    oracle_results,
    run,
    run_oracle,
    smallest_margin,
    tolerances_beside,
    tolerances_of,
)

import actvar
from actvar import ActVARConfig


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("rate", "total", "count"),
    [(0.75, 169, 127), (0.75, 256, 192), (0.75, 16, 12), (0.75, 25, 19), (0.5, 9, 5), (0.01, 25, 1), (1.0, 25, 25)],
)
def test_a_rate_keeps_the_nearest_count_and_at_least_one(rate: float, total: int, count: int) -> None:
    assert oracle.rate_to_count(rate, total) == count
    assert actvar.config.share_of(rate, total) == count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_in_float64_is_the_oracle_up_to_rounding(kind: str, mode: str) -> None:
    case = Case(**KINDS[kind])
    var, (xs, cond) = model_of(case, torch.float64), inputs_of(case, torch.float64)
    actual, _ = run(case, mode, var, xs, cond)
    expected, _ = run_oracle(case, mode, var, xs, cond)
    assert max(value.abs().max() for value in expected.values()) > 1
    assert max(largest_errors(actual, expected).values()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in CASES for mode in (IN_A_ROW, TEACHER_FORCED)),
        *((name, ALONE) for name in CASES if name.startswith(("the paper's rates", "keys of all", "three"))),
    ],
)
def test_the_patched_model_chooses_and_computes_what_the_oracle_does(name: str, mode: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tolerance = tolerances_of(case, mode, dtype)
    expected, choices = oracle_results(case, mode)
    assert smallest_margin(choices, case) > 2 * tolerance["output"]
    actual, records = run(case, mode, model_of(case, dtype), *inputs_of(case, dtype))
    assert_same_choices(records, choices, tolerance["output"])
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", LOW_DTYPES.values(), ids=LOW_DTYPES)
@pytest.mark.parametrize("mode", [ALONE, TEACHER_FORCED])
@pytest.mark.parametrize(
    ("kind", "kv"), [*((kind, "compact") for kind in KINDS), ("separate AdaLN, with QK norm", "all")]
)
def test_low_precision_adds_no_more_error_at_fixed_choices_than_it_does_to_the_dense_model(
    kind: str, kv: str, mode: str, dtype: torch.dtype
) -> None:
    case = Case(ActVARConfig(kv=kv), rows=2, **KINDS[kind])
    var, (xs, cond) = model_of(case, dtype), inputs_of(case, dtype)
    actual, records = run(case, mode, var, xs, cond)
    fixed = {(record.block, record.scale.index): as_chosen(record, case.rows) for record in records}
    expected, _ = run_oracle(case, mode, var, xs, cond, fixed)
    assert {value.dtype for value in actual.values()} == {dtype}
    assert_close(actual, expected, tolerances_of(case, mode, dtype))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != ALONE])
def test_fixed_tokens_are_those_of_the_first_block_in_all_blocks(mode: str) -> None:
    case = Case(ActVARConfig(fixed_tokens=True))
    var, (xs, cond) = model_of(case), inputs_of(case)
    actual, records = run(case, mode, var, xs, cond)
    chosen = {(record.block, record.scale.index): as_chosen(record, case.rows) for record in records}
    assert all(chosen[key].tokens == chosen[0, key[1]].tokens for key in chosen)
    expected, _ = run_oracle(case, mode, var, xs, cond, chosen)
    assert_close(actual, expected, tolerances_of(case, mode, torch.float32))
    _, own = run_oracle(Case(ActVARConfig()), mode, var, xs, cond)
    assert own[0, 3].tokens == chosen[0, 3].tokens
    assert own[1, 3].tokens != chosen[1, 3].tokens


@pytest.mark.parametrize("dtype", LOW_DTYPES.values(), ids=LOW_DTYPES)
@pytest.mark.parametrize("autocast", [False, True], ids=["low-precision weights", "autocast"])
def test_scores_and_logits_are_in_float32_in_a_low_precision_model(dtype: torch.dtype, autocast: bool) -> None:
    case = Case(ActVARConfig())
    weights_dtype = torch.float32 if autocast else dtype
    var, (xs, cond) = model_of(case, weights_dtype), inputs_of(case, weights_dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        _, records = run(case, ALONE, var, xs, cond)
    tolerance = tolerances_of(case, ALONE, torch.float32)["output"]
    assert len(records) == 2 * DEPTH
    for record in records:
        gates = gates_of(var.blocks[record.block])
        for row, x in enumerate(xs[record.scale.index].double()):
            weight, bias = gates.selector_weight.double(), gates.selector_bias.double()
            scores = torch.stack([oracle.linear(weight, bias, oracle.layer_norm(token))[0] for token in x])
            assert record.scores[row].dtype == torch.float32
            torch.testing.assert_close(record.scores[row].double(), scores, rtol=0, atol=tolerance)
            assert record.index[row].tolist() == oracle.highest(record.scores[row].tolist(), record.scale.keep)
            weight, bias = gates.router_weight.double(), gates.router_bias.double()
            for token, u in enumerate(record.u[row].double()):
                logits = record.logits[row, token]
                assert logits.dtype == torch.float32
                torch.testing.assert_close(logits.double(), oracle.linear(weight, bias, u), rtol=0, atol=tolerance)
                chosen = record.mask[row, token].nonzero().flatten().tolist()
                assert chosen == oracle.highest(logits.tolist(), record.scale.experts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_constant_selector_keeps_the_first_tokens(mode: str, dtype: torch.dtype) -> None:
    case = Case(ActVARConfig())
    var, (xs, cond) = model_of(case, dtype), inputs_of(case, dtype)
    choose_by(var, "selector", 0.3)
    actual, records = run(case, mode, var, xs, cond)
    for record in records:
        assert record.index.tolist() == [list(range(case.actives[record.scale.index].keep))] * case.rows
    expected, choices = run_oracle(case, mode, var, xs, cond)
    assert_same_choices(records, choices, tolerances_of(case, mode, dtype)["output"])
    assert_close(actual, expected, tolerances_of(case, mode, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_constant_router_turns_the_first_experts_on(mode: str, dtype: torch.dtype) -> None:
    case = Case(ActVARConfig(ffn_rate=(0.5, 0.75)))
    var, (xs, cond) = model_of(case, dtype), inputs_of(case, dtype)
    choose_by(var, "router", -0.2)
    actual, records = run(case, mode, var, xs, cond)
    for record in records:
        first = torch.arange(16) < {3: 8, 4: 12}[record.scale.index]
        assert torch.equal(record.mask, first.expand_as(record.mask))
    expected, choices = run_oracle(case, mode, var, xs, cond)
    assert_same_choices(records, choices, tolerances_of(case, mode, dtype)["output"])
    assert_close(actual, expected, tolerances_of(case, mode, dtype))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", [ALONE, TEACHER_FORCED])
def test_of_duplicated_tokens_the_first_ones_are_kept(mode: str, dtype: torch.dtype, rows: int) -> None:
    case = Case(ActVARConfig(), rows=rows)
    var, (xs, cond) = model_of(case, dtype), inputs_of(case, dtype)
    xs = [x[:, torch.arange(x.shape[1]) % 2] if x.shape[1] > 1 else x for x in xs]
    actual, records = run(case, mode, var, xs, cond)
    expected, choices = run_oracle(case, mode, var, xs, cond)
    assert_same_choices(records, choices, tolerances_of(case, mode, dtype)["output"])
    assert_close(actual, expected, tolerances_of(case, mode, dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["compact", "all"])
def test_sparse_operations_that_keep_everything_give_the_dense_model_within_rounding(
    kv: str, kind: str, mode: str
) -> None:
    dense = Case(**KINDS[kind])
    config = ActVARConfig(scales=(-3, -2, -1), token_rates=(1, 1, 1), ffn_rate=1, kv=kv, always_sparse=True)
    case = replace(dense, config=config)
    actual, records = run(case, mode, model_of(case), *inputs_of(case))
    assert len(records) == 3 * DEPTH
    for record in records:
        assert record.index.tolist() == [list(range(record.scale.tokens))] * case.rows
        assert record.mask.all()
    unpatched, _ = run(dense, mode, model_of(dense), *inputs_of(case))
    tolerance = tolerances_of(case, mode, torch.float32)
    assert_close(actual, {name: value.double() for name, value in unpatched.items()}, tolerance)
    assert_close(actual, oracle_results(dense, mode)[0], tolerance)


@pytest.mark.parametrize("name", ["the paper's rates", "keys of all tokens", "three active scales"])
@pytest.mark.parametrize("gate", ["selector", "router", "both"])
def test_gates_that_learn_do_not_change_the_teacher_forced_values(name: str, gate: str) -> None:
    case = CASES[name]
    var, (xs, cond) = model_of(case, torch.float64), inputs_of(case, torch.float64)
    for block in var.blocks:
        for learned in ("selector", "router") if gate == "both" else (gate,):
            getattr(block.actvar, learned).requires_grad_(True)
    tolerance = tolerances_of(case, TEACHER_FORCED, torch.float64)
    expected, choices = oracle_results(case, TEACHER_FORCED)
    with torch.enable_grad():
        actual, records = run(case, TEACHER_FORCED, var, xs, cond)
    assert_same_choices(records, choices, tolerance["output"])
    assert_close({name: value.detach() for name, value in actual.items()}, expected, tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_a_query_scale_above_100_counts_as_100(mode: str) -> None:
    case = Case(ActVARConfig())
    var, plain, (xs, cond) = model_of(case), model_of(replace(case, config=None)), inputs_of(case)
    for block in (*var.blocks, *plain.blocks):
        block.attn.scale_mul_1H11[:, 1] = 6.0
    tolerance = tolerances_beside(replace(case, config=None), mode, plain, xs, cond)
    expected, choices = run_oracle(case, mode, var, xs, cond)
    actual, records = run(case, mode, var, xs, cond)
    assert_same_choices(records, choices, tolerance["output"])
    assert_close(actual, expected, tolerance)


def rates() -> st.SearchStrategy[float]:
    return st.one_of(st.just(1.0), st.floats(0.01, 1.0))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    scales = draw(st.lists(st.integers(-5, 4), min_size=1, max_size=3, unique_by=lambda scale: scale % 5))
    count = len(scales)
    config = ActVARConfig(
        scales=tuple(scales),
        token_rates=tuple(draw(st.lists(rates(), min_size=count, max_size=count))),
        ffn_rate=draw(st.one_of(rates(), st.lists(rates(), min_size=count, max_size=count).map(tuple))),
        num_experts=draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])),
        kv=draw(st.sampled_from(["compact", "all"])),
        share_cfg_selection=draw(st.booleans()),
        always_sparse=draw(st.booleans()),
    )
    flags = {name: draw(st.booleans()) for name in ("shared_aln", "attn_l2_norm", "guided")}
    return Case(config, rows=2, **flags)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=cases(), mode=st.sampled_from(MODES))
def test_any_configuration_gives_what_the_oracle_gives(case: Case, mode: str) -> None:
    with torch.no_grad():
        tolerance = tolerances_of(case, mode, torch.float64)
        expected, choices = oracle_results(case, mode)
        assume(smallest_margin(choices, case) > 2 * tolerance["output"])
        actual, records = run(case, mode, model_of(case, torch.float64), *inputs_of(case, torch.float64))
        assert_same_choices(records, choices, tolerance["output"])
        assert_close(actual, expected, tolerance)
