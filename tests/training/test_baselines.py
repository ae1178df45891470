"""Every baseline against plain code, and its removal."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from support.baseline_oracle import (
    assert_close,
    drawn_tokens,
    logits_of,
    oracle_logits,
    static_adapter_file,
    token_maps,
)
from support.helpers import PATCH_NUMS, sample
from torch.nn import functional as F

import actvar
from actvar import baselines
from actvar.baselines.fastvar import interpolated, pivotal_tokens
from actvar.baselines.token_merging import Matching, destinations
from actvar.config import DENSE
from actvar.flops import counted_flops, sampling_flops, total_flops
from actvar.models import VAR
from actvar.patching.patch import patched_silently


@pytest.fixture
def small(tiny_var, make_var) -> VAR:
    small = make_var(depth=1, width=64)
    small.vae_proxy = tiny_var.vae_proxy
    return small


@pytest.fixture
def static_adapter(tiny_var, tmp_path) -> Path:
    return static_adapter_file(tiny_var, tmp_path)


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
    assert interpolated(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), (2, 2), (4, 4))[0, :, 0].view(4, 4).tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


def test_tokens_are_merged_with_the_destination_they_are_most_like():
    x = torch.randn(3, 25, 8, generator=torch.Generator().manual_seed(0))
    matching = Matching(x, 14, (5, 5))
    to = destinations(5, 5).tolist()
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
            side = math.isqrt(x.shape[1])
            matchings[index] = Matching(x, math.floor(0.5 * x.shape[1] + 0.5), (side, side))
        of_block = matchings[index]

        def normed(block, scale, shift):
            return of_block.merge(block.ln_wo_grad(x) * (1 + scale) + shift)

        return of_block.unmerge(sublayer(x, normed=normed))

    expected = oracle_logits(tiny_var, update)
    with baselines.token_merging(tiny_var, 0.5):
        assert_close(logits_of(tiny_var), expected)


def test_without_guidance_both_halves_are_the_dense_conditional_logits(tiny_var):
    dense = logits_of(tiny_var)
    with baselines.without_guidance(tiny_var, 2):
        found = logits_of(tiny_var)
    assert_close(found, [*dense[:2], *(logits[:2].repeat(2, 1, 1) for logits in dense[2:])])


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
    with pytest.raises(ValueError, match="token maps"), baselines.collaborative_decoding(tiny_var, fewer, 1):
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
