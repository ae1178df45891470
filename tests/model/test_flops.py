from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from actvar import ActVARConfig, apply_patch, record
from actvar.config import DENSE
from actvar.flops import (
    MODULES,
    counted_flops,
    equation_12,
    formula_flops,
    model_flops,
    total_flops,
)
from actvar.models import OFFICIAL_PATCH_NUMS, build_vae_var
from actvar_kernels.backend import using_backend


def maps_of(sides):
    return tuple((side, side) for side in sides)


D16 = dict(
    width=1024,
    hidden=4096,
    depth=16,
    vocab_size=4096,
    code_size=32,
    maps=maps_of(OFFICIAL_PATCH_NUMS),
    adaln="per block",
)
CONFIGS = [
    None,
    ActVARConfig(),
    ActVARConfig(kv="all"),
    ActVARConfig(token_rates=(1, 1)),
    ActVARConfig(ffn_rate=1),
    ActVARConfig(scales=(0, 2, 3), token_rates=(1, 0.5, 0.3), ffn_rate=(0.5, 1, 0.2), num_experts=8),
]


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_formula_and_counter_agree_by_module_and_scale(make_var, config, shared_aln):
    var = make_var(shared_aln=shared_aln)
    if config is not None:
        apply_patch(var, config)
    assert model_flops(var, 3) == counted_flops(var, 3)


@pytest.mark.parametrize("config", CONFIGS)
def test_counter_equals_a_count_over_the_tokens_and_experts_of_a_real_run(make_var, config):
    var = make_var()
    if config is not None:
        apply_patch(var, config)
    explicit = flops_of_a_run(var, [1, 2])
    counted = [{name: getattr(step, name) for name in MODULES} for step in counted_flops(var, 2)]
    assert [step.keys() for step in explicit] == [step.keys() for step in counted]
    for want, got in zip(explicit, counted, strict=True):
        assert got == pytest.approx(want, rel=0.01)


def test_a_model_without_adaln_counts_none():
    steps = {adaln: formula_flops(**{**D16, "adaln": adaln}, batch=1) for adaln in ("none", "shared")}
    assert [step.adaln for step in steps["none"]] == [0] * len(steps["none"])
    assert [replace(step, adaln=0) for step in steps["shared"]] == steps["none"]


def flops_of_a_run(var, labels) -> list[Counter]:
    """Samples, then goes through what every block did at every scale, token by token and expert by expert."""
    config = var.actvar.config if hasattr(var, "actvar") else DENSE
    chosen = {}
    if config is not DENSE:
        with record(var) as records:
            var.autoregressive_infer_cfg(len(labels), torch.tensor(labels), g_seed=0)
        chosen = {(r.block, r.scale.index): r for r in records}
    C, N, rows = var.C, config.num_experts, 2 * len(labels)
    linear = lambda inputs, outputs: 2 * inputs * outputs  # noqa: E731
    cached = {(block, row): 0 for block in range(var.depth) for row in range(rows)}
    steps = []
    for index, side in enumerate(var.patch_nums):
        flops = Counter(dict.fromkeys(MODULES, 0))
        tokens = range(side * side)
        for block, row in cached:
            choice = chosen.get((block, index))
            selected = choice is not None and choice.index is not None
            kept = choice.index[row].tolist() if selected else tokens
            own = kept if config.kv == "compact" else tokens
            flops["selector"] += sum(linear(C, 1) for _token in tokens) if selected else 0
            flops["adaln"] += linear(C, 6 * C)
            flops["qkv"] += sum(linear(C, C) for _token in kept) + sum(2 * linear(C, C) for _token in own)
            for place, _token in enumerate(kept):
                keys = cached[block, row] + len(own)
                flops["attention"] += sum(2 * C + 2 * C for _key in range(keys))
                flops["proj"] += linear(C, C)
                if choice is None or choice.mask is None:
                    flops["ffn"] += linear(C, 4 * C) + linear(4 * C, C)
                    continue
                flops["router"] += sum(linear(C, 1) for _expert in range(N))
                for is_on in choice.mask[row, place].tolist():
                    flops["ffn"] += is_on * (linear(C, 4 * C // N) + linear(4 * C // N, C))
            cached[block, row] += len(own)
        for row in range(rows):
            flops["adaln"] += linear(C, 2 * C)
            flops["head"] += sum(linear(C, var.V) for _token in tokens)
            if index and row % 2:  # tokens are embedded once for the two rows of an image
                flops["head"] += sum(linear(var.Cvae, C) for _token in tokens)
        steps.append(flops)
    return steps


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("config", [None, ActVARConfig(token_rates=(1, 1))])
def test_counter_equals_torchs_on_the_sampling_loop_itself(make_var, config, shared_aln, monkeypatch):
    var = make_var(shared_aln=shared_aln)
    if config is not None:
        apply_patch(var, config)
    side = var.patch_nums[-1]
    monkeypatch.setattr(var.vae_proxy[0], "fhat_to_img", lambda f_hat: torch.zeros(len(f_hat), 1, side, side))
    with using_backend("reference"), FlopCounterMode(display=False) as counter:
        var.autoregressive_infer_cfg(3, 1, g_seed=0)
    seen = counter.get_flop_counts()["Global"]
    of_the_quantizer = seen.pop(torch.ops.aten.convolution)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert of_the_quantizer > 0
    assert attention not in seen, "torch has a formula now: leave ours out"
    steps = counted_flops(var, 3)
    assert sum(seen.values()) == total_flops(steps) - sum(step.attention for step in steps)


@pytest.mark.parametrize("name", ["d20", "bfloat16 gates"])
def test_models_without_weights_and_of_another_dtype_are_counted_alike(make_var, name):
    if name == "d20":
        var = build_vae_var(depth=20, device="meta")[1]
        apply_patch(var)
    else:
        var = apply_patch(make_var()).bfloat16()
    assert counted_flops(var, 1) == model_flops(var, 1)


def test_one_block_of_the_last_scale_equals_a_count_over_tokens_and_experts():
    sizes = D16 | dict(depth=1)
    step = formula_flops(**sizes, batch=1, config=ActVARConfig())[-1]
    kept, experts, dense_scales, kept_at_scale_9 = 192, 12, 255, 127
    ffn = attention = selector = router = 0
    for _row in range(2):
        selector += sum(2 * 1024 for _token in range(256))
        for _token in range(kept):
            attention += 2 * 2 * 1024 * (dense_scales + kept_at_scale_9 + kept)
            router += sum(2 * 1024 for _expert in range(16))
            ffn += sum(2 * 2 * 1024 * 256 for _expert in range(experts))
    assert (step.ffn, step.attention, step.selector, step.router) == (ffn, attention, selector, router)


def test_equation_12_is_the_difference_of_two_counts_where_no_keys_are_cached():
    sides, rates = (4, 8), dict(scales=(1,), token_rates=(0.75,), ffn_rate=0.5)
    L, kept, C, experts = 64, 48, 128, 8
    dense = sum(8 * C * C + 16 * C * C + sum(4 * C for _key in range(L)) for _token in range(L))
    sparse = sum(2 * C for _token in range(L))
    for _token in range(kept):
        sparse += 8 * C * C + sum(4 * C for _key in range(kept))
        sparse += sum(2 * C for _expert in range(16)) + sum(2 * 2 * C * 4 * C // 16 for _expert in range(experts))
    config = ActVARConfig(**rates)
    assert equation_12(width=C, depth=3, maps=maps_of(sides), config=config) == pytest.approx(3 * (dense - sparse))


def test_equation_12_differs_from_the_formula_by_the_cached_keys_alone():
    config, sides = ActVARConfig(), (8, 16, 24)
    sizes = D16 | dict(maps=maps_of(sides))
    dense, sparse = (formula_flops(**sizes, batch=1, config=c) for c in (DENSE, config))
    # queries of 48 and then 144 fewer tokens over the cached ones, and 64 fewer cached ones at the last scale
    missed = 4 * 1024 * ((256 - 192) * 64 + 576 * (64 + 256) - 432 * (64 + 192))
    saved = equation_12(width=1024, depth=16, maps=maps_of(sides), config=config) + 16 * missed
    assert (total_flops(dense) - total_flops(sparse)) / 2 == pytest.approx(saved)


def test_equation_12_charges_no_gate_that_does_not_run():
    sizes = dict(width=1024, depth=16, maps=maps_of(OFFICIAL_PATCH_NUMS))
    assert equation_12(**sizes, config=DENSE) == 0


def test_the_papers_configuration_saves_a_good_fifth_of_d16():
    dense, sparse = (total_flops(formula_flops(**D16, batch=1, **kw)) for kw in ({}, {"config": ActVARConfig()}))
    assert 0.22 < 1 - sparse / dense < 0.24


def test_counting_leaves_the_model_as_it_was(tiny_var):
    before = {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    counted_flops(tiny_var, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_var.state_dict().items())
    assert tiny_var.blocks[0].attn.cached_k is None


def operator_calls() -> dict[str, tuple]:
    """Arguments of every operator with a registered formula, and its FLOPs by counting."""
    R, L, K, C, N, M, D, H, P = 2, 7, 5, 64, 4, 3, 128, 1, 9
    x, rows, gate = torch.randn(R, L, C), torch.randn(R, K, C), torch.randn(R, 1, C)
    router = torch.randn(N, C), torch.zeros(N)
    ffn = torch.randn(D, C), torch.zeros(D), torch.randn(C, D), torch.zeros(C)
    mask = torch.zeros(R, K, N, dtype=torch.bool)
    mask[..., :M] = True
    q, cache = torch.randn(R, H, K, C), torch.randn(R, H, P + K, C)
    index = torch.arange(K).repeat(R, 1)
    attention = sum(2 * 2 * H * C for _query in range(R * K) for _key in range(P + K))
    experts = sum(2 * 2 * C * D // N for _token in range(R * K) for _expert in range(M))
    logits = sum(2 * C for _token in range(R * K) for _expert in range(N))
    past = (cache, cache.clone(), P, None, 1.0, None)
    return {
        "select_tokens": ((x, torch.randn(1, C), torch.zeros(1), gate, gate, K, False, False), R * L * 2 * C),
        "subset_attention": ((q, q, q, *past), attention),
        "subset_attention_append": ((q, q, q, *past), attention),
        "route_experts": ((rows, *router, M), logits),
        "add_normalize_route": ((x, index, rows, gate, gate, gate, *router, M, False), logits),
        "expert_ffn": ((rows, mask, M, *ffn), experts),
        "expert_ffn_scatter": ((x, index, rows, None, None, rows, mask, M, *ffn, gate, "auto"), experts),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_torchs_counter_knows_every_operator(name):
    arguments, flops = operator_calls()[name]
    with torch.no_grad(), using_backend("reference"), FlopCounterMode(display=False) as counter:
        getattr(torch.ops.actvar_kernels, name)(*arguments)
    assert counter.get_total_flops() == flops
