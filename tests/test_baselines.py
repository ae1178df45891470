"""Every baseline against plain code, and its removal."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import PATCH_NUMS, sample
from torch.nn import functional as F

import actvar
from actvar import baselines
from actvar.adapter import read_adapter_config, save_adapter
from actvar.baselines.fastvar import interpolated, pivotal_tokens
from actvar.baselines.static_pruning import fix_experts
from actvar.baselines.token_merging import Matching, destinations
from actvar.config import ActVARConfig
from actvar.distill import Stage2
from actvar.evaluate.predictions import predictions
from actvar.flops import counted_flops, sampling_flops, total_flops
from actvar.models import VAR
from actvar.patch import DENSE, patched_silently
from actvar.tuned import tuned_parameters

STATIC = ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=0.75)
STARTS = [sum(side * side for side in PATCH_NUMS[:scale]) for scale in range(len(PATCH_NUMS))]


@pytest.fixture
def small(tiny_var, make_var) -> VAR:
    small = make_var(depth=1, width=64)
    small.vae_proxy = tiny_var.vae_proxy
    return small


@pytest.fixture
def static_adapter(tiny_var, tmp_path):
    """File of static pruning with changed weights."""
    with patched_silently(tiny_var, STATIC, None):
        fix_experts(tiny_var, baselines.magnitude_units(tiny_var, 0.75))
        Stage2(tiny_var)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in tuned_parameters(tiny_var).values():
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
        save_adapter(tiny_var, tmp_path / "static.safetensors")
    return tmp_path / "static.safetensors"


@pytest.fixture
def applied(tiny_var, small, static_adapter):
    """Each baseline by name, on the tiny model."""
    units = {score: getattr(baselines, f"{score}_units") for score in ("magnitude", "wanda")}
    return {
        "static-magnitude": lambda: baselines.static_pruning(tiny_var, units["magnitude"](tiny_var, 0.5)),
        "static-wanda": lambda: baselines.static_pruning(tiny_var, units["wanda"](tiny_var, 0.5)),
        "static-trained": lambda: baselines.trained_static_pruning(tiny_var, static_adapter),
        "fastvar": lambda: baselines.fastvar(tiny_var, 0.5),
        "tome": lambda: baselines.token_merging(tiny_var, 0.5),
        "skip": lambda: baselines.skip_last_scales(tiny_var, 1),
        "unguided": lambda: baselines.without_guidance(tiny_var, 2),
        "code": lambda: baselines.collaborative_decoding(tiny_var, small, 2),
    }


NAMES = ("static-magnitude", "static-wanda", "static-trained", "fastvar", "tome", "skip", "unguided", "code")


def token_maps(var: VAR, images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randint(var.V, (images, side * side), generator=generator) for side in var.patch_nums]
    return torch.arange(images), var.vae_proxy[0].quantize.teacher_input(maps)


def logits_of(var: VAR) -> list[torch.Tensor]:
    return [logits for _, logits in predictions(var, *token_maps(var))]


@torch.no_grad()
def oracle_logits(var: VAR, update) -> list[torch.Tensor]:
    """Logits by scale of plain code: `update(block_index, scale, name, x, sublayer)` is what stands for
    `sublayer(x)`, the gated output of attention or FFN; keys and values are those of the rows a sublayer saw."""
    labels, inputs = token_maps(var)
    labels = torch.cat((labels, torch.full_like(labels, var.num_classes)))
    cond = var.class_emb(labels)
    position = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    caches = [None] * len(var.blocks)
    found = []
    for scale, side in enumerate(var.patch_nums):
        span = slice(STARTS[scale], STARTS[scale] + side * side)
        if scale:
            x = var.word_embed(inputs[:, span.start - 1 : span.stop - 1]).repeat(2, 1, 1) + position[:, span]
        else:
            x = cond.unsqueeze(1) + var.pos_start + position[:, span]
        modulation = var.shared_ada_lin(cond)
        for index, block in enumerate(var.blocks):
            parts = block.ada_gss + modulation if block.shared_aln else block.ada_lin(modulation).view(-1, 1, 6, var.C)
            gamma1, gamma2, scale1, scale2, shift1, shift2 = parts.unbind(2)

            def attention(rows, block=block, index=index, gate=gamma1, scale=scale1, shift=shift1, normed=None):
                u = block.ln_wo_grad(rows) * (1 + scale) + shift if normed is None else normed(block, scale, shift)
                block.attn.kv_caching(True)
                if caches[index] is not None:
                    block.attn.cached_k, block.attn.cached_v = caches[index]
                out = block.attn(u, None) * gate
                caches[index] = block.attn.cached_k, block.attn.cached_v
                block.attn.kv_caching(False)
                return out

            def ffn(rows, block=block, gate=gamma2, scale=scale2, shift=shift2, normed=None):
                u = block.ln_wo_grad(rows) * (1 + scale) + shift if normed is None else normed(block, scale, shift)
                return block.ffn(u) * gate

            for name, sublayer in (("attention", attention), ("ffn", ffn)):
                x = x + update(index, scale, name, x, sublayer)
        found.append(var.get_logits(x, cond))
    return found


def drawn_tokens(var: VAR) -> list[torch.Tensor]:
    """Token maps `[2, side, side]` of `sample`."""
    maps, embedding = [], var.vae_proxy[0].quantize.embedding
    handle = embedding.register_forward_pre_hook(lambda _, arguments: maps.append(arguments[0]))
    sample(var)
    handle.remove()
    return maps


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for of_scale, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(of_scale, wanted, atol=2e-4, rtol=1e-4)


def test_predictions_in_steps_are_those_of_teacher_forcing(tiny_var):
    labels, inputs = token_maps(tiny_var)
    expected = tiny_var(labels, inputs)
    found = torch.cat([logits[: len(labels)] for logits in logits_of(tiny_var)], dim=1)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert_close(logits_of(tiny_var), oracle_logits(tiny_var, lambda index, scale, name, x, sublayer: sublayer(x)))


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_changes_the_image_repeats_it_and_comes_off_bit_for_bit(tiny_var, applied, name):
    dense, before, parameters = sample(tiny_var), copy.deepcopy(tiny_var.state_dict()), list(tiny_var.parameters())
    with applied[name]():
        first, second = sample(tiny_var), sample(tiny_var)
    assert torch.equal(first, second)
    assert not torch.equal(first, dense)
    assert torch.equal(sample(tiny_var), dense)
    assert all(torch.equal(value, before[key]) for key, value in tiny_var.state_dict().items())
    assert all(a is b for a, b in zip(tiny_var.parameters(), parameters, strict=True))
    assert "predict" not in vars(tiny_var)
    assert not any("forward" in vars(block) for block in tiny_var.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_comes_off_after_an_error(tiny_var, applied, name):
    dense, before = sample(tiny_var), copy.deepcopy(tiny_var.state_dict())
    with pytest.raises(ValueError, match="g_seed"), applied[name]():
        tiny_var.autoregressive_infer_cfg(2, 1, g_seed=[1])
    assert torch.equal(sample(tiny_var), dense)
    assert all(torch.equal(value, before[key]) for key, value in tiny_var.state_dict().items())
    assert not hasattr(tiny_var, "actvar")


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_saves_flops(tiny_var, applied, name):
    dense = sampling_flops(tiny_var)
    with applied[name]():
        assert sampling_flops(tiny_var) < dense


def test_flops_of_sampling_are_those_counted_by_module(tiny_var):
    assert sampling_flops(tiny_var) == total_flops(counted_flops(tiny_var, 1))
    actvar.apply_patch(tiny_var, actvar.ActVARConfig())
    assert sampling_flops(tiny_var) == total_flops(counted_flops(tiny_var, 1))


def test_baselines_of_nothing_left_out_are_the_dense_model(tiny_var, small):
    with patched_silently(tiny_var, DENSE, None):
        expected = sample(tiny_var)
    everything = (
        baselines.static_pruning(tiny_var, baselines.magnitude_units(tiny_var, 1.0)),
        baselines.fastvar(tiny_var, 1.0),
        baselines.token_merging(tiny_var, 1.0),
        baselines.collaborative_decoding(tiny_var, copy.deepcopy(tiny_var), 2),
    )
    for applied in everything:
        with applied:
            torch.testing.assert_close(sample(tiny_var), expected)


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
        assert set(block.actvar.places[:384].tolist()) == set(kept.tolist())
    with actvar.record(tiny_var) as records:
        sample(tiny_var)
    masks = torch.cat([r.mask.flatten(0, -2) for r in records])
    assert masks[:, :6].all()
    assert not masks[:, 6:].any()
    twice = [torch.cat((of_block[:1], of_block[:-1])) for of_block in units]
    for wrong in (units[:1], [of_block[1:] for of_block in units], twice):
        with pytest.raises(ValueError, match=r"units: expected \[384, 384\] or more different ones"):
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
            assert set(block.actvar.places[: count * 64].tolist()) == set(of_block[: count * 64].tolist())


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


def test_fastvar_is_its_definition(tiny_var):
    """Scores, the kept rows' outputs and what is restored, by loops; the first of the two blocks computes all."""
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def update(index, scale, name, x, sublayer):
        if scale < 2 or index == 0:
            kept[index, name] = sublayer(x)
            return kept[index, name]
        side, before = PATCH_NUMS[scale], PATCH_NUMS[1]
        count = math.floor(0.5 * side * side + 0.5)
        chosen = []
        for row in x:
            mean = sum(row) / len(row)
            score = [float((token - mean).square().sum()) for token in row]
            chosen.append(sorted(range(len(row)), key=lambda i: -score[i])[:count])
        computed = sublayer(torch.stack([row[of_row] for row, of_row in zip(x, chosen, strict=True)]))
        maps = kept[index, name].transpose(1, 2).unflatten(2, (before, before))
        out = F.interpolate(maps, size=(side, side), mode="area").flatten(2).transpose(1, 2).clone()
        for row, of_row in enumerate(chosen):
            out[row, of_row] = computed[row]
        return out

    expected = oracle_logits(tiny_var, update)
    with baselines.fastvar(tiny_var, 0.5):
        assert_close(logits_of(tiny_var), expected)


def test_pivotal_tokens_are_far_from_the_mean_and_maps_are_enlarged_by_area():
    x = torch.tensor([[[0.0], [1.0], [9.0], [-8.0]]])
    assert pivotal_tokens(x, 2)[0].sort().values.tolist() == [2, 3]
    assert interpolated(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), 16)[0, :, 0].view(4, 4).tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


def test_tokens_are_merged_with_the_destination_they_are_most_like():
    x = torch.randn(3, 25, 8, generator=torch.Generator().manual_seed(0))
    matching = Matching(x, 14)
    to = destinations(5).tolist()
    assert to == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    for row, tokens in enumerate(x):
        sources = [i for i in range(25) if i not in to]
        like = {i: [float(F.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in to] for i in sources}
        merged = sorted(sources, key=lambda i: -max(like[i]))[:11]
        groups = {j: [j] for j in to} | {i: [i] for i in sources if i not in merged}
        for i in merged:
            groups[to[max(range(9), key=lambda j, i=i: like[i][j])]].append(i)
        rows, back = matching.merge(x)[row], matching.unmerge(matching.merge(x))[row]
        assert len(rows) == len(groups) == 14
        for members in groups.values():
            mean = sum(tokens[i] for i in members) / len(members)
            for i in members:
                torch.testing.assert_close(back[i], mean)


def test_tome_is_its_definition(tiny_var):
    matchings: dict[int, Matching] = {}

    def update(index, scale, name, x, sublayer):
        if scale < 2:
            return sublayer(x)
        if name == "attention":
            matchings[index] = Matching(x, math.floor(0.5 * x.shape[1] + 0.5))
        of_block = matchings[index]

        def normed(block, scale, shift):
            return of_block.merge(block.ln_wo_grad(x) * (1 + scale) + shift)

        return of_block.unmerge(sublayer(x, normed=normed))

    expected = oracle_logits(tiny_var, update)
    with baselines.token_merging(tiny_var, 0.5):
        assert_close(logits_of(tiny_var), expected)


def test_without_guidance_conditional_logits_are_the_dense_ones_and_half_the_rows(tiny_var):
    dense = logits_of(tiny_var)
    with baselines.without_guidance(tiny_var, 2):
        found = logits_of(tiny_var)
    assert_close(found, [*dense[:2], *(logits[:2] for logits in dense[2:])])


def test_skipping_is_the_image_of_the_first_token_maps(tiny_var):
    features = []
    decode = VAR.decode
    with baselines.skip_last_scales(tiny_var, 2):
        tiny_var.decode = lambda f_hat: features.append(f_hat.clone()) or decode(tiny_var, f_hat)
        sample(tiny_var)
    del tiny_var.decode
    maps = drawn_tokens(tiny_var)
    quantizer, partial = tiny_var.vae_proxy[0].quantize, torch.zeros_like(features[0])
    for scale in range(2):
        partial, _ = quantizer.add_scale(scale, partial, quantizer.code_map(maps[scale], PATCH_NUMS[scale]))
    torch.testing.assert_close(features[0], partial)


def test_in_collaborative_decoding_the_last_scales_are_the_small_models(tiny_var, small):
    expected = [*logits_of(tiny_var)[:2], *logits_of(small)[2:]]
    with baselines.collaborative_decoding(tiny_var, small, 2):
        assert_close(logits_of(tiny_var), expected)
    assert not hasattr(small, "actvar")


def test_collaborative_decoding_needs_the_same_autoencoder(tiny_var, make_var):
    other = make_var(depth=1)
    with torch.no_grad():
        other.vae_proxy[0].quantize.embedding.weight.add_(1)
    with pytest.raises(ValueError, match="same autoencoder"), baselines.collaborative_decoding(tiny_var, other, 1):
        pass
    fewer = make_var(patch_nums=(1, 2, 5))
    with pytest.raises(ValueError, match="patch_nums"), baselines.collaborative_decoding(tiny_var, fewer, 1):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda var: baselines.skip_last_scales(var, 4), "count: expected from 1 to 3"),
        (lambda var: baselines.without_guidance(var, 0), "count: expected from 1 to 3"),
        (lambda var: baselines.token_merging(var, 0.2), "can be merged to"),
        (lambda var: baselines.fastvar(var, 0.5, scales=(0, -1)), "a scale before them"),
        (lambda var: baselines.static_pruning(var, []), "of each of 2 blocks"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(tiny_var, make, message):
    dense = sample(tiny_var)
    with pytest.raises(ValueError, match=message), make(tiny_var):
        pass
    assert not hasattr(tiny_var, "actvar")
    assert torch.equal(sample(tiny_var), dense)


def test_another_kind_of_model_is_refused():
    with pytest.raises(TypeError, match=r"actvar.models.VAR"), baselines.skip_last_scales(torch.nn.Linear(1, 1), 1):
        pass
