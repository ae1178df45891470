"""A second family, unlike VAR, goes through all that a patch does; nothing outside of families knows VAR's names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint, make_tiny_var
from support.toy_family import CLASSES, MAPS, STARTS, TOKENS, ToyFamily, ToyModel

import actvar.families
from actvar import ActVARConfig, apply_patch, load_adapter, patched, record, remove_patch, save_adapter
from actvar.calibrate import calibrate
from actvar.distill.stage1 import Stage1
from actvar.distill.stage2 import Stage2
from actvar.evaluate.divergence import divergence_by_scale
from actvar.evaluate.predictions import DensePredictions
from actvar.families import family_of
from actvar.families.var import VARFamily
from actvar.patching.patch import DENSE
from actvar.sampling.token_maps import drawn_token_maps

LABELS = torch.tensor([0, 3, 5])
SPARSE = ActVARConfig(token_rates=(0.5, 0.6), ffn_rate=0.5, num_experts=8)
FORCED = ActVARConfig(token_rates=(1, 1), ffn_rate=1, num_experts=8, always_sparse=True)


@pytest.fixture
def toy(monkeypatch) -> ToyModel:
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    return ToyModel().eval()


def draw(model: ToyModel) -> torch.Tensor:
    return model.autoregressive_infer_cfg(3, LABELS, g_seed=1, cfg=2.0)


@torch.no_grad()
def batch_of(model: ToyModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return labels, inputs and token maps for teacher forcing."""
    token_maps = drawn_token_maps(model, LABELS, 1, 2.0)
    return LABELS, ToyFamily().teacher_input(model, LABELS, token_maps), token_maps


def test_each_model_has_its_own_family(toy):
    assert isinstance(family_of(toy), ToyFamily)
    assert isinstance(family_of(make_tiny_var()), VARFamily)
    with pytest.raises(TypeError, match=r"Linear cannot be patched. Supported: VAR .*; toy: expected a ToyModel"):
        family_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kv", ["compact", "all"])
@pytest.mark.parametrize("config", [DENSE, FORCED], ids=["rates of 1", "rates of 1, forced"])
def test_rates_of_one_draw_the_images_of_the_dense_model(toy, config, kv):
    images = draw(toy)
    with patched(toy, ActVARConfig(**vars(config) | {"kv": kv})):
        torch.testing.assert_close(draw(toy), images, atol=1e-5, rtol=0)
        labels, inputs, _ = batch_of(toy)
        sparse = toy(labels, inputs)
    torch.testing.assert_close(sparse, toy(labels, inputs), atol=1e-5, rtol=0)


def test_a_patch_is_sparse_and_comes_off_bit_for_bit(toy):
    before, images = fingerprint(toy), draw(toy)
    apply_patch(toy, SPARSE)
    with record(toy) as records:
        assert not torch.equal(draw(toy), images)
    assert [(r.block, r.scale.index, r.index.shape[1], int(r.mask[0, 0].sum())) for r in records] == [
        (block, scale, keep, 4) for scale, keep in ((2, 3), (3, 9)) for block in range(3)
    ]
    remove_patch(toy)
    assert_same_fingerprint(before, fingerprint(toy))
    assert torch.equal(draw(toy), images)


@pytest.mark.parametrize("kv", ["compact", "all"])
def test_sampling_and_teacher_forcing_compute_the_same(toy, kv):
    apply_patch(toy, ActVARConfig(**vars(SPARSE) | {"kv": kv}))
    labels, inputs, _ = batch_of(toy)
    at_once = toy(torch.cat((labels, torch.full_like(labels, CLASSES))), inputs.repeat(2, 1, 1))
    for scale, logits in ToyFamily().scale_logits(toy, labels, inputs):
        of_scale = at_once[:, STARTS[scale] : STARTS[scale] + TOKENS[scale]]
        torch.testing.assert_close(logits, of_scale, atol=1e-5, rtol=1e-5)


def test_positions_of_kept_tokens_reach_queries_and_keys(toy):
    """Without its positions a kept token would be rotated as another one."""
    apply_patch(toy, SPARSE)
    labels, inputs, _ = batch_of(toy)
    with record(toy) as records:
        logits = toy(labels, inputs)
    kept = next(r for r in records if r.scale.index == 3 and r.block == 0)
    assert kept.index.max() >= kept.index.shape[1], "else every position is its own number"
    project = ToyFamily.project

    def unplaced(self, block, queries_from, keys_from, bias, queries_at, *others):
        rows = torch.arange(queries_from.shape[1]).expand(len(queries_from), -1)
        return project(self, block, queries_from, keys_from, bias, queries_at._replace(index=rows), *others)

    ToyFamily.project = unplaced
    try:
        assert not torch.allclose(toy(labels, inputs), logits, atol=1e-4)
    finally:
        ToyFamily.project = project


def test_it_trains_under_teacher_forcing(toy):
    labels, inputs, token_maps = batch_of(toy)
    apply_patch(toy, SPARSE)
    stage = Stage1(toy)
    stage(labels, inputs, token_maps)["loss"].backward()
    assert all(block.actvar.router.weight.grad.abs().sum() > 0 for block in toy.layers)
    assert all(block.actvar.selector.weight.grad.abs().sum() > 0 for block in toy.layers)
    stage = Stage2(toy)
    losses = stage(labels, inputs, token_maps)
    losses["loss"].backward()
    assert losses["block"] > 0
    assert toy.layers[0].feed_forward.up.weight.grad.abs().sum() > 0


def test_it_is_calibrated_and_its_adapter_is_saved_and_loaded(toy, tmp_path):
    images = draw(toy)
    report = calibrate(toy, SPARSE, images=8)
    assert report.flops["chosen"] <= report.flops["budget"] < report.flops["dense"]
    save_adapter(toy, tmp_path / "toy.safetensors")
    sparse = draw(toy)
    remove_patch(toy)
    assert torch.equal(draw(toy), images)
    load_adapter(toy, tmp_path / "toy.safetensors")
    assert torch.equal(draw(toy), sparse)


def test_it_is_judged_by_its_divergence_from_the_dense_model(toy):
    labels, inputs, _ = batch_of(toy)
    dense = DensePredictions(toy, [(labels, inputs)], cfg=2.0)
    apply_patch(toy, SPARSE)
    found = dense.divergences(toy)
    by_scale = divergence_by_scale(toy, [(labels, inputs)])
    for name in ("kl", "kl_drawn"):
        assert len(found[name]) == len(MAPS)
        assert found[name][0] == pytest.approx(0, abs=1e-6)
        assert found[name][3] > 1e-4
    assert by_scale[3] == pytest.approx(found["kl"][3], rel=1e-3)


NAMES_OF_VAR = (
    r"model\.blocks\b|var\.blocks\b|(?<!v_)\bpatch_nums(?!=)|ada_lin|ada_gss|mat_qkv|\bfc[12]\b(?!_)|\.ffn\.|block\.ffn\b"
    r"|\.attn\b(?!\.kv_caching)|word_embed|class_emb|lvl_embed|pos_1LC|pos_start|head_nm|vae_proxy|cond_BD|ln_wo_grad"
)


def test_names_of_vars_parts_stand_in_families_and_models_alone():
    package = Path(actvar.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in ("families", "models")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if re.search(NAMES_OF_VAR, line)
    ]
    assert found == []


def test_the_family_of_var_is_imported_by_families_alone():
    package = Path(actvar.__file__).parent
    importing = [path for path in package.rglob("*.py") if "families.var" in path.read_text("utf-8")]
    assert {path.relative_to(package).parts[0] for path in importing} <= {"families"}
