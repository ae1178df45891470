"""The patched block against the float64 oracle: block by block, over sequences with the K/V cache, teacher forced.

Tolerances are three times the largest error of the *dense* model against the oracle, with the same weights and in the
same dtype. In float64 models LayerNorm, scores and logits of an active scale are still in float32, so these are held
to the error of the float32 dense model. Errors seen, in outputs of up to 9: 5e-6 in float32 (9e-6 to 1.4e-5 allowed)
and 8e-7 in float64; at fixed choices 0.11 in bfloat16 and 0.015 in float16. Scores and logits have to agree within the
tolerance, and every choice of the oracle has to be clear by more than twice of it: so the chosen tokens and experts
have to be exactly the oracle's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import actvar
from actvar import ActVARConfig
from actvar.models import build_vae_var
from actvar.recording import BlockRecord
from actvar_kernels.backend import using_backend

PATCH_NUMS = (1, 2, 3, 4, 5)
LENGTHS = [side * side for side in PATCH_NUMS]
WIDTH, DEPTH = 128, 2
GATE_SEED = 3  # under which no choice of `CASES` is a close one
ALONE, IN_A_ROW, TEACHER_FORCED = MODES = ("each block alone", "the blocks in a row", "teacher forced")
KINDS = {
    f"{adaln} AdaLN, {norm} QK norm": {"shared_aln": adaln == "shared", "attn_l2_norm": norm == "with"}
    for adaln in ("separate", "shared")
    for norm in ("with", "without")
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LOW_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Choices = dict[tuple[int, int], oracle.Chosen]
"""By block and scale."""
Results = dict[str, Tensor]
"""Outputs by "output <block> <scale>", caches by "keys <block>" and "values <block>"."""


@dataclass(frozen=True)
class Case:
    """A configuration (None: the dense model), the kind of model, rows, and whether the caller says they are guided."""

    config: ActVARConfig | None = None
    shared_aln: bool = False
    attn_l2_norm: bool = True
    rows: int = 2
    guided: bool = False

    @property
    def actives(self) -> dict[int, oracle.Active]:
        """By scale, what the oracle is to do there."""
        config = self.config
        if config is None:
            return {}
        shared = config.share_cfg_selection and self.guided
        ffn_rates = config.ffn_rate if isinstance(config.ffn_rate, tuple) else [config.ffn_rate] * len(config.scales)
        return {
            scale % len(LENGTHS): oracle.Active(
                keep=oracle.rate_to_count(token_rate, LENGTHS[scale]),
                experts=oracle.rate_to_count(ffn_rate, config.num_experts),
                kv=config.kv,
                share_guidance=shared,
            )
            for scale, token_rate, ffn_rate in zip(config.scales, config.token_rates, ffn_rates, strict=True)
        }


CASES = {
    "the paper's rates": Case(ActVARConfig(), rows=3),
    "the paper's rates, shared AdaLN": Case(ActVARConfig(), shared_aln=True),
    "the paper's rates, no QK norm": Case(ActVARConfig(), attn_l2_norm=False),
    "keys of all tokens": Case(ActVARConfig(kv="all"), rows=3),
    "keys of all tokens, shared AdaLN, no QK norm": Case(ActVARConfig(kv="all"), shared_aln=True, attn_l2_norm=False),
    "one token kept": Case(ActVARConfig(token_rates=(0.01, 0.04))),
    "one token kept, keys of all tokens": Case(ActVARConfig(token_rates=(0.04, 0.01), kv="all")),
    "all tokens kept by force": Case(ActVARConfig(token_rates=(1, 1), always_sparse=True)),
    "one expert of 16": Case(ActVARConfig(ffn_rate=0.01)),
    "all experts on by force": Case(ActVARConfig(ffn_rate=1, always_sparse=True)),
    "a single expert": Case(ActVARConfig(num_experts=1)),
    "4 experts": Case(ActVARConfig(num_experts=4), shared_aln=True),
    "32 experts": Case(ActVARConfig(num_experts=32), attn_l2_norm=False),
    "an FFN rate per scale": Case(ActVARConfig(ffn_rate=(0.25, 0.9))),
    "only tokens": Case(ActVARConfig(ffn_rate=1)),
    "only experts": Case(ActVARConfig(token_rates=(1, 1))),
    "tokens at one scale and experts at the other": Case(ActVARConfig(token_rates=(0.5, 1), ffn_rate=(1, 0.5))),
    "three active scales": Case(
        ActVARConfig(scales=(-3, -2, -1), token_rates=(0.4, 0.6, 0.8), ffn_rate=(0.3, 0.5, 0.7))
    ),
    "scales out of order with a dense one between": Case(
        ActVARConfig(scales=(3, 1), token_rates=(0.6, 0.5), kv="all"), rows=1
    ),
    "the first scale, which has one token": Case(ActVARConfig(scales=(0, -1), token_rates=(0.5, 0.5)), rows=1),
    "guided rows that choose on their own": Case(ActVARConfig(), rows=4, guided=True),
    "guided rows that share their tokens": Case(ActVARConfig(share_cfg_selection=True), rows=4, guided=True),
    "guided rows that share their tokens, keys of all": Case(
        ActVARConfig(share_cfg_selection=True, kv="all"), shared_aln=True, rows=4, guided=True
    ),
    "shared selection that nobody announced": Case(ActVARConfig(share_cfg_selection=True), rows=4),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def dense_model(shared_aln: bool, attn_l2_norm: bool) -> nn.Module:
    """A model in float32 whose every weight matters: gates of the branches about 1, biases that are not 0."""
    _, var = build_vae_var(
        V=32,
        Cvae=8,
        ch=32,
        patch_nums=PATCH_NUMS,
        num_classes=10,
        depth=DEPTH,
        width=WIDTH,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
        image_channels=1,
        ch_mult=(1, 1),
        num_res_blocks=1,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(var.named_parameters()):
            z = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_mul_1H11"):
                parameter.copy_(1 + 0.3 * z)
            elif name.endswith("ada_gss"):
                parameter.copy_(0.5 * z)
            elif parameter.ndim >= 2:
                parameter.copy_(z / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * z)
    return var


def model_of(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The case's model, patched with random selectors and routers, in `dtype`."""
    var = copy.deepcopy(dense_model(case.shared_aln, case.attn_l2_norm))
    if case.config is not None:
        actvar.apply_patch(var, case.config)
        generator = torch.Generator().manual_seed(GATE_SEED)
        for block in var.blocks:
            for gate in (block.actvar.selector, block.actvar.router):
                gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) / WIDTH**0.5)
                gate.bias.copy_(0.3 * torch.randn(gate.bias.shape, generator=generator))
    return var.to(dtype)


def gates_of(block: nn.Module) -> oracle.Gates:
    selector, router = block.actvar.selector, block.actvar.router
    return oracle.Gates(selector.weight, selector.bias, router.weight, router.bias)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 2) -> tuple[list[Tensor], Tensor]:
    """Block input `[R, L_s, C]` of every scale, and the condition `[R, C]` or `[R, 1, 6, C]`."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(case.rows, length, WIDTH, generator=generator).to(dtype) for length in LENGTHS]
    if case.shared_aln:
        return xs, (0.5 * torch.randn(case.rows, 1, 6, WIDTH, generator=generator)).to(dtype)
    return xs, torch.randn(case.rows, WIDTH, generator=generator).to(dtype)


def groups_of(mode: str) -> list[list[int]]:
    """The blocks that an input goes through in one go."""
    return [[index] for index in range(DEPTH)] if mode == ALONE else [list(range(DEPTH))]


def run(case: Case, mode: str, var: nn.Module, xs: list[Tensor], cond: Tensor) -> tuple[Results, list[BlockRecord]]:
    """What the package computes and chooses."""
    results = {}
    announced = actvar.guided_rows(var) if case.guided else nullcontext()
    recording = nullcontext([]) if case.config is None else actvar.record(var)
    with announced, recording as records:
        for group in groups_of(mode):
            blocks = [var.blocks[index] for index in group]
            if mode == TEACHER_FORCED:
                x = torch.cat(xs, dim=1)
                for index, block in zip(group, blocks, strict=True):
                    x = results[f"output {index}"] = block(x=x, cond_BD=cond, attn_bias=var.attn_bias_for_masking)
                continue
            for block in blocks:
                block.attn.kv_caching(True)
            for scale, x in enumerate(xs):
                for index, block in zip(group, blocks, strict=True):
                    x = results[f"output {index} {scale}"] = block(x=x, cond_BD=cond, attn_bias=None)
                if scale == len(xs) - 2:  # what the last scale finds; what it leaves is never attended to
                    for index in group:
                        results[f"keys {index}"] = var.blocks[index].attn.cached_k
                        results[f"values {index}"] = var.blocks[index].attn.cached_v
            for block in blocks:
                block.attn.kv_caching(False)
    return results, records


def run_oracle(
    case: Case,
    mode: str,
    var: nn.Module,
    xs: list[Tensor],
    cond: Tensor,
    fixed: Mapping[tuple[int, int], oracle.Chosen] | None = None,
) -> tuple[Results, Choices]:
    """What the oracle computes and chooses with the weights of `var`."""
    results, choices = {}, {}
    state = [block.state_dict() for block in var.blocks]
    for group in groups_of(mode):
        if mode == TEACHER_FORCED:
            x = torch.cat(xs, dim=1)
            for index in group:
                own = fixed and {scale: fixed[index, scale] for scale in case.actives}
                gates = gates_of(var.blocks[index]) if case.actives else None
                x, chosen = oracle.teacher_forced_block(state[index], gates, LENGTHS, case.actives, x, cond, own)
                choices.update({(index, scale): value for scale, value in chosen.items()})
                results[f"output {index}"] = x
            continue
        caches = {index: [[] for _ in range(case.rows)] for index in group}
        for scale, x in enumerate(xs):
            for index in group:
                if scale in case.actives:
                    x, choices[index, scale] = oracle.actvar_block(
                        state[index],
                        gates_of(var.blocks[index]),
                        case.actives[scale],
                        x,
                        cond,
                        caches[index],
                        fixed and fixed[index, scale],
                    )
                else:
                    x = oracle.dense_block(state[index], x, cond, caches[index])
                results[f"output {index} {scale}"] = x
            if scale == len(xs) - 2:
                for index in group:
                    for part, name in enumerate(("keys", "values")):
                        rows = [torch.stack([token[part] for token in row], dim=1) for row in caches[index]]
                        results[f"{name} {index}"] = torch.stack(rows)
    return results, choices


@functools.cache
def oracle_results(case: Case, mode: str) -> tuple[Results, Choices]:
    return run_oracle(case, mode, model_of(case), *inputs_of(case))


@functools.cache
def tolerances(kind: Case, mode: str, dtype: torch.dtype) -> dict[str, float]:
    """Three times the largest error of the dense model in `dtype`, for outputs, keys and values."""
    assert kind.config is None
    var, (xs, cond) = model_of(kind, dtype), inputs_of(kind, dtype)
    actual, _ = run(kind, mode, var, xs, cond)
    expected, _ = run_oracle(kind, mode, var, xs, cond)
    errors = largest_errors(actual, expected)
    return {part: 3 * error for part, error in errors.items()}


def tolerances_of(case: Case, mode: str, dtype: torch.dtype) -> dict[str, float]:
    held_to = torch.float32 if dtype == torch.float64 else dtype
    return tolerances(Case(None, case.shared_aln, case.attn_l2_norm, rows=4), mode, held_to)


def largest_errors(actual: Results, expected: Results) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    errors: dict[str, float] = {}
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        part = name.split()[0]
        error = (value.double() - expected[name]).abs().max().item()
        assert error == error, f"{name} is not a number"
        errors[part] = max(errors.get(part, 0.0), error)
    return errors


def assert_close(actual: Results, expected: Results, tolerance: dict[str, float]) -> None:
    for part, error in largest_errors(actual, expected).items():
        assert error <= tolerance[part], f"{part}: error {error:.3g}, allowed {tolerance[part]:.3g}"


def smallest_margin(choices: Choices, case: Case) -> float:
    """The least distance between a score that was chosen and one that was not, over every choice made."""
    margins = [float("inf")]
    for (_, scale), chosen in choices.items():
        decides = case.rows // 2 if case.actives[scale].share_guidance else case.rows
        decisions = list(zip(chosen.scores[:decides], chosen.tokens[:decides], strict=True))
        for logits, experts in zip(chosen.logits, chosen.experts, strict=True):
            decisions.extend(zip(logits, experts, strict=True))
        for scores, taken in decisions:
            left = [score for index, score in enumerate(scores) if index not in taken]
            if left:
                margins.append(min(scores[index] for index in taken) - max(left))
    return min(margins)


def assert_same_choices(records: list[BlockRecord], choices: Choices, tolerance: float) -> None:
    """Exactly the oracle's tokens and experts, and its scores and logits within the tolerance."""
    seen = set()
    for record in records:
        key = record.block, record.scale.index
        chosen = choices[key]
        seen.add(key)
        if record.index is not None:
            assert record.index.tolist() == chosen.tokens
            torch.testing.assert_close(record.scores, float32(chosen.scores), rtol=0, atol=tolerance)
        if record.mask is not None:
            assert record.mask.dtype == torch.bool
            experts = [[token.nonzero().flatten().tolist() for token in row] for row in record.mask]
            assert experts == chosen.experts
            torch.testing.assert_close(record.logits, float32(chosen.logits), rtol=0, atol=tolerance)
    skippable = {key for key in choices if key not in seen}
    for block, scale in skippable:  # dense there: all tokens and all experts
        chosen = choices[block, scale]
        assert all(len(tokens) == LENGTHS[scale] for tokens in chosen.tokens)
        assert all(len(experts) == len(chosen.logits[0][0]) for row in chosen.experts for experts in row)


def float32(nested: list) -> Tensor:
    return torch.tensor(nested, dtype=torch.float32)


def as_chosen(record: BlockRecord, rows: int) -> oracle.Chosen:
    """A record as choices for the oracle to take."""
    tokens = [list(range(record.scale.tokens))] * rows if record.index is None else record.index.tolist()
    experts = [[token.nonzero().flatten().tolist() for token in row] for row in record.mask]
    return oracle.Chosen(tokens=tokens, experts=experts)


def choose_by(var: nn.Module, gate: str, constant: float) -> None:
    """Make the score of every token, or of every expert, the same."""
    for block in var.blocks:
        module = getattr(block.actvar, gate)
        module.weight.zero_()
        module.bias.fill_(constant)


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
def test_under_shared_selection_the_conditional_row_decides_on_tokens_and_nobody_on_experts(mode: str) -> None:
    case = CASES["guided rows that share their tokens"]
    _, records = run(case, mode, model_of(case), *inputs_of(case))
    assert len(records) == 2 * DEPTH
    for record in records:
        conditional, unconditional = record.index.chunk(2)
        assert torch.equal(conditional, unconditional)
        conditional, unconditional = record.mask.chunk(2)
        assert not torch.equal(conditional, unconditional)


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
    expected, _ = run_oracle(replace(case, config=None), mode, plain, xs, cond)
    dense, _ = run(replace(case, config=None), mode, plain, xs, cond)
    tolerance = {part: 3 * error for part, error in largest_errors(dense, expected).items()}
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
