"""Static pruning of the FFN: which units stay, without training and with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.baseline_oracle import STATIC, assert_close, drawn_tokens, logits_of, oracle_logits, static_adapter_file
from support.helpers import sample

import actvar
from actvar import baselines
from actvar.baselines.static_pruning import fix_experts
from actvar.config import ActVARConfig
from actvar.flops import sampling_flops
from actvar.patching.adapter import read_adapter_config, save_adapter
from actvar.patching.patch import patched_silently


@pytest.fixture
def static_adapter(tiny_var, tmp_path) -> Path:
    return static_adapter_file(tiny_var, tmp_path)


def test_static_pruning_is_the_ffn_of_the_other_units_zeroed(tiny_var):
    units = baselines.magnitude_units(tiny_var, 0.5)
    hidden = tiny_var.blocks[0].ffn.fc1.out_features

    def update(index, scale, name, x, sublayer):
        block = tiny_var.blocks[index]
        if name == "attention" or scale < 2:
            return sublayer(x)
        off = torch.ones(hidden, dtype=torch.bool)
        off[units[index]] = False
        whole = block.ffn.fc2.weight.clone()
        block.ffn.fc2.weight[:, off] = 0
        try:
            return sublayer(x)
        finally:
            block.ffn.fc2.weight.copy_(whole)

    expected = oracle_logits(tiny_var, update)
    with baselines.static_pruning(tiny_var, units):
        assert_close(logits_of(tiny_var), expected)


def test_fixed_experts_are_pruning_to_the_same_units_for_every_token(tiny_var):
    actvar.apply_patch(tiny_var, ActVARConfig(num_experts=8))
    units = baselines.wanda_units(tiny_var, 0.75)
    fix_experts(tiny_var, units)
    for block, kept in zip(tiny_var.blocks, units, strict=True):
        assert set(block.actvar.hidden_order[:384].tolist()) == set(kept.tolist())
    with actvar.record(tiny_var) as records:
        sample(tiny_var)
    masks = torch.cat([r.mask.flatten(0, -2) for r in records])
    assert masks[:, :6].all()
    assert not masks[:, 6:].any()
    twice = [torch.cat((of_block[:1], of_block[:-1])) for of_block in units]
    message = r"units: expected \[384, 384\] or more different ones in the blocks, got \["
    for wrong in (units[:1], [of_block[1:] for of_block in units], twice):
        with pytest.raises(ValueError, match=message):
            fix_experts(tiny_var, wrong)


def test_fixed_experts_of_several_rates_hold_the_units_worth_most_first(tiny_var):
    rates = ((0.25, 0.5), (0.75, 0.125))
    actvar.apply_patch(tiny_var, ActVARConfig(ffn_rate=rates, token_rates=(1, 1), num_experts=8))
    units = baselines.wanda_units(tiny_var, 1.0)
    with pytest.raises(ValueError, match=r"units: expected \[384, 256\] or more different ones in the blocks, got \["):
        fix_experts(tiny_var, [of_block[:300] for of_block in units])
    fix_experts(tiny_var, units)
    with actvar.record(tiny_var) as records:
        sample(tiny_var)
    on = [r.mask.flatten(0, -2) for r in records]
    assert sorted(int(mask.sum(dim=1).unique()) for mask in on) == [1, 2, 4, 6]
    assert all(mask[:, : int(mask[0].sum())].all() for mask in on), "the first experts are on"
    for block, of_block, counts in zip(tiny_var.blocks, units, ((2, 6), (4, 1)), strict=True):
        for count in counts:
            assert set(block.actvar.hidden_order[: count * 64].tolist()) == set(of_block[: count * 64].tolist())


def test_trained_static_pruning_is_the_patched_model_on_smaller_matrices(tiny_var, static_adapter):
    with patched_silently(tiny_var, read_adapter_config(static_adapter), static_adapter):
        logits, tokens = logits_of(tiny_var), drawn_tokens(tiny_var)
    with baselines.static_pruning(tiny_var, baselines.magnitude_units(tiny_var, 0.75)):
        untrained, flops = drawn_tokens(tiny_var), sampling_flops(tiny_var)
    with baselines.trained_static_pruning(tiny_var, static_adapter):
        assert_close(logits_of(tiny_var), logits)
        assert all(map(torch.equal, drawn_tokens(tiny_var), tokens))
        assert sampling_flops(tiny_var) == flops, "no router"
    assert not all(map(torch.equal, untrained, tokens))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (ActVARConfig(), r"got token_rates \(0.75, 0.75\) and ffn_rate 0.75"),
        (ActVARConfig(token_rates=(1, 1), ffn_rate=(0.5, 0.75)), r"and ffn_rate \(0.5, 0.75\)"),
        (STATIC, "got routers whose choice is not the first experts"),
    ],
)
def test_an_adapter_that_is_not_static_is_refused_and_the_model_stays(tiny_var, tmp_path, config, found):
    dense, path = sample(tiny_var), tmp_path / "mine.safetensors"
    with patched_silently(tiny_var, config, None):
        save_adapter(tiny_var, path)
    message = rf"mine.safetensors: expected an adapter of static pruning.*{found}.*; sample with this one by"
    with pytest.raises(ValueError, match=message), baselines.trained_static_pruning(tiny_var, path):
        pass
    assert not hasattr(tiny_var, "actvar")
    assert torch.equal(sample(tiny_var), dense)


def test_the_units_that_stay_are_the_largest(tiny_var):
    block = tiny_var.blocks[1]
    with torch.no_grad():
        block.ffn.fc2.weight[:, 7] = 100.0
        block.ffn.fc1.weight[9] = 0.0
    into, out_of = block.ffn.fc1.weight.tolist(), block.ffn.fc2.weight.T.tolist()
    score = [math.hypot(*into[i]) * math.hypot(*out_of[i]) for i in range(len(into))]
    units = baselines.magnitude_units(tiny_var, 0.25)[1].tolist()
    assert units == sorted(range(len(score)), key=lambda i: -score[i])[: len(score) // 4]
    assert 7 in units
    assert 9 not in units


def test_wanda_drops_units_that_are_never_on(tiny_var):
    block = tiny_var.blocks[0]
    quiet = torch.arange(0, block.ffn.fc1.out_features, 4)
    with torch.no_grad():
        block.ffn.fc1.bias[quiet] = -100.0  # GELU of it is 0, whatever the weights
        block.ffn.fc2.weight[:, quiet] *= 10
    units = baselines.wanda_units(tiny_var, 0.75)
    assert not set(units[0].tolist()) & set(quiet.tolist())
    assert set(baselines.magnitude_units(tiny_var, 0.75)[0].tolist()) & set(quiet.tolist())
