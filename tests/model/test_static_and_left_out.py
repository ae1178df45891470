"""Static experts are on for every token without a router, and sampling may end before the last scales."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var
from support.toy_family import CODE_SIZE, MAPS, STARTS, ToyFamily, ToyModel

import actvar.families
from actvar import ActVARConfig, Execution, apply_patch, load_adapter, patched, remove_patch, save_adapter
from actvar.baselines.static_pruning import fix_experts, magnitude_units
from actvar.config import DENSE
from actvar.families import blocks_of, family_of
from actvar.families.var import VARFamily
from actvar.flops import counted_flops, model_flops
from actvar.patching.patch import reconfigure
from actvar.sampling.summary import summary
from actvar.sparse.contexts import record
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import brgemm

LABELS = torch.tensor([1, 3, 0])
FIXED = dict(token_rates=(1, 1), ffn_rate=0.5, num_experts=8)
needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")


def draw(model):
    return model.autoregressive_infer_cfg(3, LABELS, g_seed=4, cfg=3.0)


def inputs_of(model):
    maps = family_of(model).maps(model)
    tokens = sum(height * width for height, width in maps[1:])
    size = family_of(model).sizes(model).code_size
    return torch.randn(3, tokens, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def scale_logits(model):
    with model.actvar.sampling(model, in_place=False):
        return [logits for _, logits in family_of(model).scale_logits(model, LABELS, inputs_of(model))]


def fixed(model, config):
    """Patch a model with routers that choose the first experts for every token, in another order than its own."""
    apply_patch(model, ActVARConfig(**config))
    fix_experts(model, [torch.arange(family_of(model).sizes(model).hidden).flip(0) for _ in blocks_of(model)])


@pytest.fixture(params=["VAR", "toy"])
def model(request, monkeypatch):
    if request.param == "VAR":
        return make_tiny_var()
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    return ToyModel().eval()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("changes", [{}, {"token_rates": (0.5, 0.6)}, {"guidance_until": -1}], ids=str)
def test_static_experts_are_routers_that_choose_the_first_for_every_token(model, changes, backend):
    with using_backend(backend):
        fixed(model, FIXED | changes)
        expected = scale_logits(model)
        forced = model(LABELS, inputs_of(model)) if not changes else None
        reconfigure(model, ActVARConfig(**FIXED | changes, static_experts=True))
        found = scale_logits(model)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        if forced is not None:
            torch.testing.assert_close(model(LABELS, inputs_of(model)), forced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"static_experts": True, "ffn_rate": 1}, {"scales_until": None}], ids=str)
def test_the_lossless_end_is_the_dense_model_and_removal_brings_it_back(model, changes):
    dense = draw(model)
    apply_patch(model, DENSE)
    expected = draw(model)
    apply_patch(model, ActVARConfig(**FIXED | {"ffn_rate": 1} | changes))
    assert torch.equal(draw(model), expected)
    apply_patch(model, ActVARConfig(**FIXED, static_experts=True, scales_until=-1))
    assert not torch.equal(draw(model), expected)
    remove_patch(model)
    assert torch.equal(draw(model), dense)


@needs_bytes
def test_static_experts_multiply_in_eight_bits():
    var = make_tiny_var()
    fixed(var, FIXED)
    reconfigure(var, ActVARConfig(**FIXED, static_experts=True))
    exact = scale_logits(var)
    reconfigure(var, var.actvar.config, Execution(weights="int8"))
    for ours, theirs in zip(scale_logits(var), exact, strict=True):
        assert 0 < (ours - theirs).abs().max() < 0.2 * theirs.abs().max()


@pytest.mark.parametrize(
    "changes",
    [{"static_experts": True}, {"scales_until": -1}, {"static_experts": True, "scales_until": 2}],
    ids=str,
)
def test_flops_are_those_of_the_units_and_scales_that_are_computed(changes):
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**FIXED | changes))
    assert model_flops(var, 3) == counted_flops(var, 3)


def test_records_of_static_experts_have_no_router():
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**FIXED, static_experts=True))
    with record(var) as records:
        draw(var)
    assert len(records) == 2 * len(var.blocks)
    assert all(each.mask is None and each.logits is None for each in records)


def test_an_adapter_keeps_static_experts_and_the_last_scale(tmp_path):
    var = make_tiny_var()
    config = ActVARConfig(**FIXED, static_experts=True, scales_until=-1)
    fixed(var, FIXED)
    reconfigure(var, config)
    images = draw(var)
    save_adapter(var, tmp_path / "adapter.safetensors")
    remove_patch(var)
    load_adapter(var, tmp_path / "adapter.safetensors")
    assert var.actvar.config == config
    assert torch.equal(draw(var), images)
    assert "4 of 8 experts for every token" in summary(var)
    assert "5x5: left out" in summary(var)


def test_the_units_of_a_block_lie_in_the_order_of_its_first_experts():
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**FIXED, static_experts=True))
    units = magnitude_units(var, 0.5)
    fix_experts(var, units)
    for block, kept in zip(var.blocks, units, strict=True):
        assert torch.equal(block.actvar.hidden_order[: len(kept)], kept)


@pytest.mark.parametrize("count", [1, 2])
def test_images_are_those_of_the_scales_before(count):
    """The scales before are drawn as the dense model draws them, and nothing is added to their features."""
    var = make_tiny_var()
    seen = []
    watched = family_of(var).watch_scales(var, lambda scale, tokens, features: seen.append(features.clone()))
    with patched(var, DENSE), watched:
        draw(var)
    features = seen[len(var.patch_nums) - 1 - count]
    with patched(var, ActVARConfig(**FIXED | {"ffn_rate": 1}, scales_until=-count)):
        found = draw(var)
        expected = var.decode(features).add(1).mul(0.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_another_family_ends_early_too(monkeypatch):
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    toy = ToyModel().eval()
    apply_patch(toy, DENSE)
    expected = scale_logits(toy)
    assert len(expected) == len(MAPS)
    apply_patch(toy, ActVARConfig(**FIXED | {"ffn_rate": 1}, scales_until=-1, weights_from=1))
    found = scale_logits(toy)
    assert len(found) == len(MAPS) - 1
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    whole = toy(LABELS, torch.zeros(3, STARTS[-1] - 1 + 15, CODE_SIZE))
    assert whole.shape[1] == STARTS[-1] + 15  # teacher forcing has all scales


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scales_until": 0}, ValueError, "scales_until: expected at least the first scale"),
        ({"scales_until": 9}, ValueError, "scales_until: the model has 4 scales, got index 9"),
        ({"scales_until": 0.5}, TypeError, "scales_until"),
        ({"static_experts": 1}, TypeError, "static_experts: expected a bool"),
    ],
)
def test_values_out_of_range_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        apply_patch(make_tiny_var(), ActVARConfig(**fields))


def test_a_loop_of_another_class_cannot_end_early(monkeypatch):
    monkeypatch.setattr(VARFamily, "loop_is_ours", lambda _family, _model: False)
    with pytest.raises(ValueError, match="scales_until: VAR samples all scales in a loop of its own"):
        apply_patch(make_tiny_var(), ActVARConfig(scales_until=-1))
