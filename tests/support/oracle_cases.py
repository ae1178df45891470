"""Make models, inputs and tolerances to compare the patched block with the float64 oracle.

Tolerances are three times the largest error of the *dense* model against the oracle, with the same weights and in the
same dtype, or, where that is more, the effect of weights that `actvar.verify.rounding.moved` changes: the first depends
on the order in which this processor adds, the second does not. In float64 models LayerNorm, scores and logits of an
active scale are still in float32, so these are held to the error of the float32 dense model. Scores and logits have to
agree within the tolerance, and every choice of the oracle has to be clear by more than twice of it: so the chosen
tokens and experts have to be exactly the oracle's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import actvar
from actvar import ActVARConfig
from actvar.models import build_vae_var
from actvar.sparse.record import BlockRecord
from actvar.verify.rounding import moved
from support import oracle

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
"""Choices by block and scale."""
Results = dict[str, Tensor]
"""Outputs by "output <block> <scale>", caches by "keys <block>" and "values <block>"."""


@dataclass(frozen=True)
class Case:
    """Describe a configuration (None: the dense model), the kind of model, rows, and whether the rows are guided."""

    config: ActVARConfig | None = None
    shared_aln: bool = False
    attn_l2_norm: bool = True
    rows: int = 2
    guided: bool = False

    @property
    def actives(self) -> dict[int, oracle.Active]:
        """Return what the oracle is to do at every active scale."""
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


@functools.cache
def dense_model(shared_aln: bool, attn_l2_norm: bool) -> nn.Module:
    """Return a model in float32 whose every weight matters: gates of the branches about 1, biases that are not 0."""
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
    """Return the case's model in `dtype`, patched with random selectors and routers."""
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
    """Return the block input `[R, L_s, C]` of every scale, and the condition `[R, C]` or `[R, 1, 6, C]`."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(case.rows, length, WIDTH, generator=generator).to(dtype) for length in LENGTHS]
    if case.shared_aln:
        return xs, (0.5 * torch.randn(case.rows, 1, 6, WIDTH, generator=generator)).to(dtype)
    return xs, torch.randn(case.rows, WIDTH, generator=generator).to(dtype)


def groups_of(mode: str) -> list[list[int]]:
    """Return the blocks that an input goes through in one go."""
    return [[index] for index in range(DEPTH)] if mode == ALONE else [list(range(DEPTH))]


def run(case: Case, mode: str, var: nn.Module, xs: list[Tensor], cond: Tensor) -> tuple[Results, list[BlockRecord]]:
    """Return what the package computes and chooses."""
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
    """Return what the oracle computes and chooses with the weights of `var`."""
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
    """Return the tolerances that the dense model gives in `dtype`, for outputs, keys and values."""
    return tolerances_beside(kind, mode, model_of(kind, dtype), *inputs_of(kind, dtype))


def tolerances_beside(kind: Case, mode: str, var: nn.Module, xs: list[Tensor], cond: Tensor) -> dict[str, float]:
    """Return three times the largest error of the dense `var`, or the effect of rounding elsewhere if it is larger."""
    assert kind.config is None
    expected, _ = run_oracle(kind, mode, var, xs, cond)
    errors = largest_errors(run(kind, mode, var, xs, cond)[0], expected)
    twin = copy.deepcopy(var).double()
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            parameter.data = moved(parameter.data)
    effects = largest_errors(run(kind, mode, twin, [x.double() for x in xs], cond.double())[0], expected)
    return {part: max(3 * errors[part], effects[part]) for part in errors}


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
    """Return the least distance between a score that was chosen and one that was not, over every choice made."""
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
    """Check for exactly the oracle's tokens and experts, and its scores and logits within the tolerance."""
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
    """Return a record as choices for the oracle to take."""
    tokens = [list(range(record.scale.tokens))] * rows if record.index is None else record.index.tolist()
    experts = [[token.nonzero().flatten().tolist() for token in row] for row in record.mask]
    return oracle.Chosen(tokens=tokens, experts=experts)


def choose_by(var: nn.Module, gate: str, constant: float) -> None:
    """Make the score of every token, or of every expert, the same."""
    for block in var.blocks:
        module = getattr(block.actvar, gate)
        module.weight.zero_()
        module.bias.fill_(constant)
