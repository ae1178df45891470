from __future__ import annotations

import pytest
import torch

from actvar import ActVARConfig, apply_patch
from actvar.flops import counted_flops, formula_flops, model_flops
from actvar.models import OFFICIAL_PATCH_NUMS
from actvar.schedule import build_schedule

D16 = dict(
    width=1024, hidden=4096, depth=16, vocab_size=4096, code_size=32, patch_nums=OFFICIAL_PATCH_NUMS, shared_aln=False
)


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        None,
        ActVARConfig(),
        ActVARConfig(kv="all"),
        ActVARConfig(token_rates=(1, 1)),
        ActVARConfig(ffn_rate=1),
        ActVARConfig(scales=(0, 2, 3), token_rates=(1, 0.5, 0.3), ffn_rate=(0.5, 1, 0.2), num_experts=8),
    ],
)
def test_formula_and_counter_agree_exactly(make_var, config, shared_aln):
    var = make_var(shared_aln=shared_aln)
    if config is not None:
        apply_patch(var, config)
    formula = sum(step.total for step in model_flops(var, 3))
    counted = counted_flops(var, 3)
    assert formula - selector_flops(config, var) == counted
    assert formula == pytest.approx(counted, rel=0.01)


def selector_flops(config, var) -> int:
    """The selector is a sum of products, which the counter takes for element-wise work."""
    if config is None:
        return 0
    tokens = sum(s.tokens for s in build_schedule(config, var.patch_nums) if s.select)
    return len(var.blocks) * 6 * 2 * var.C * tokens


def test_one_block_of_the_last_scale_equals_a_count_over_tokens_and_experts():
    sizes = D16 | dict(depth=1)
    step = formula_flops(**sizes, batch=1, config=ActVARConfig())[-1]
    kept, experts, dense_scales, kept_at_scale_9 = 192, 12, 255, 127
    ffn = attention = 0
    for _row in range(2):
        for _token in range(kept):
            attention += 2 * 2 * 1024 * (dense_scales + kept_at_scale_9 + kept)
            ffn += sum(2 * 2 * 1024 * 256 for _expert in range(experts))
    assert (step.ffn, step.attention) == (ffn, attention)


def test_the_papers_configuration_saves_a_good_fifth_of_d16():
    dense, sparse = (
        sum(s.total for s in formula_flops(**D16, batch=1, **kw)) for kw in ({}, {"config": ActVARConfig()})
    )
    assert 0.22 < 1 - sparse / dense < 0.24


def test_counting_leaves_the_model_as_it_was(tiny_var):
    before = {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    counted_flops(tiny_var, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_var.state_dict().items())
    assert tiny_var.blocks[0].attn.cached_k is None
