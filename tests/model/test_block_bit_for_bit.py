"""What the patched block does exactly: the rows it chooses, changes, caches and attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.oracle_cases import (
    ALONE,
    CASES,
    DEPTH,
    DTYPES,
    KINDS,
    LENGTHS,
    LOW_DTYPES,
    MODES,
    TEACHER_FORCED,
    Case,
    inputs_of,
    model_of,
    run,
)
from torch import Tensor, nn

import actvar
from actvar import ActVARConfig
from actvar.sparse.record import BlockRecord
from actvar_kernels.backend import using_backend


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("mode", MODES)
def test_under_shared_selection_the_conditional_row_decides_on_tokens_and_nobody_on_experts(mode: str) -> None:
    case = CASES["guided rows that share their tokens"]
    _, records = run(case, mode, model_of(case), *inputs_of(case))
    assert len(records) == 2 * DEPTH
    for record in records:
        conditional, unconditional = record.index.chunk(2)
        assert torch.equal(conditional, unconditional)
        conditional, unconditional = record.mask.chunk(2)
        assert not torch.equal(conditional, unconditional)


@pytest.mark.parametrize("dtype", {**DTYPES, **LOW_DTYPES}.values(), ids={**DTYPES, **LOW_DTYPES})
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_every_rate_at_1_the_patched_model_is_the_dense_one_bit_for_bit(
    kind: str, mode: str, dtype: torch.dtype
) -> None:
    dense = Case(**KINDS[kind])
    case = replace(dense, config=ActVARConfig(token_rates=(1, 1), ffn_rate=1))
    with using_backend("reference"):
        actual, records = run(case, mode, model_of(case, dtype), *inputs_of(case, dtype))
    expected, _ = run(dense, mode, model_of(dense, dtype), *inputs_of(case, dtype))
    assert records == []
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("dtype", {**DTYPES, **LOW_DTYPES}.values(), ids={**DTYPES, **LOW_DTYPES})
@pytest.mark.parametrize("mode", [ALONE, TEACHER_FORCED])
@pytest.mark.parametrize("kv", ["compact", "all"])
def test_unselected_tokens_keep_their_value_bit_for_bit_and_selected_ones_do_not(
    kv: str, mode: str, dtype: torch.dtype
) -> None:
    case = Case(ActVARConfig(kv=kv))
    var, (xs, cond) = model_of(case, dtype), inputs_of(case, dtype)
    for block in var.blocks:
        with actvar.record(var) as records:
            if mode == TEACHER_FORCED:
                x = torch.cat(xs, dim=1)
                outputs = block(x=x, cond_BD=cond, attn_bias=var.attn_bias_for_masking).split(LENGTHS, dim=1)
            else:
                block.attn.kv_caching(True)
                outputs = [block(x=x, cond_BD=cond, attn_bias=None) for x in xs]
        assert len(records) == 2
        for record in records:
            x, out = xs[record.scale.index], outputs[record.scale.index]
            kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, record.index, True)
            assert kept.sum(dim=1).tolist() == [case.actives[record.scale.index].keep] * case.rows
            assert torch.equal(out[~kept], x[~kept])
            assert (out[kept] != x[kept]).any(dim=-1).all()


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (ActVARConfig(), [1, 5, 14, 26]),
        (ActVARConfig(kv="all"), [1, 5, 14, 30]),
        (ActVARConfig(scales=(-3, -2, -1), token_rates=(0.4, 0.5, 0.5)), [1, 5, 9, 17]),
        (ActVARConfig(scales=(1,), token_rates=(0.25,)), [1, 2, 11, 27]),
        (ActVARConfig(token_rates=(0.01, 0.01)), [1, 5, 14, 15]),
        (ActVARConfig(token_rates=(1, 1)), [1, 5, 14, 30]),
    ],
    ids=["compact", "all", "three scales", "an early scale", "one token", "only experts"],
)
def test_the_cache_grows_by_the_kept_rows_of_an_active_scale(config: ActVARConfig, lengths: list[int]) -> None:
    case = Case(config)
    var, (xs, cond) = model_of(case), inputs_of(case)
    for block in var.blocks:
        block.attn.kv_caching(True)
        seen = []
        for x in xs[:-1]:
            block(x=x, cond_BD=cond, attn_bias=None)
            assert block.attn.cached_k.shape == block.attn.cached_v.shape
            seen.append(block.attn.cached_k.shape[2])
        assert seen == lengths
        block(x=xs[-1], cond_BD=cond, attn_bias=None)


def perturbed(block: nn.Module, xs: list[Tensor], record: BlockRecord) -> tuple[list[Tensor], Tensor]:
    """The inputs with the lowest token of every row at the record's scale pushed further down, and its position."""
    dropped = record.scores.argmin(dim=1)
    rows = torch.arange(len(dropped))
    away = block.actvar.selector.weight.flatten()
    changed = [x.clone() for x in xs]
    changed[record.scale.index][rows, dropped] -= 8 * away / away.norm()
    return changed, dropped


@pytest.mark.parametrize("mode", [ALONE, TEACHER_FORCED])
@pytest.mark.parametrize("kv", ["compact", "all"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_dropped_row_is_seen_by_nobody_unless_its_keys_are_kept(scale: int, kv: str, mode: str) -> None:
    case = Case(ActVARConfig(scales=(-3, -2, -1), token_rates=(0.6, 0.6, 0.6), kv=kv))
    var, (xs, cond) = model_of(case), inputs_of(case)

    def outputs_of(block: nn.Module, xs: list[Tensor]) -> tuple[list[Tensor], dict[int, BlockRecord]]:
        with actvar.record(var) as records:
            if mode == TEACHER_FORCED:
                out = block(x=torch.cat(xs, dim=1), cond_BD=cond, attn_bias=var.attn_bias_for_masking)
                outputs = list(out.split(LENGTHS, dim=1))
            else:
                block.attn.kv_caching(True)
                outputs = [block(x=x, cond_BD=cond, attn_bias=None) for x in xs]
        return outputs, {record.scale.index: record for record in records}

    for block in var.blocks:
        before, records = outputs_of(block, xs)
        changed, dropped = perturbed(block, xs, records[scale])
        after, records_after = outputs_of(block, changed)
        for index, record in records.items():
            assert torch.equal(record.index, records_after[index].index)
        rows = torch.arange(case.rows)
        assert torch.equal(after[scale][rows, dropped], changed[scale][rows, dropped])
        assert not torch.equal(after[scale][rows, dropped], before[scale][rows, dropped])
        before[scale][rows, dropped] = after[scale][rows, dropped] = 0
        unchanged = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert unchanged == [kv == "compact" or index < scale for index in range(len(LENGTHS))]
