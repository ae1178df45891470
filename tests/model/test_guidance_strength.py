"""Weights that imitate guidance follow a smaller strength than the one they imitate, in proportion."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from support.helpers import make_tiny_var
from support.infinity import tiny_infinity, tiny_text

from actvar import ActVARConfig, Execution, apply_patch, load_adapter, load_pretrained, remove_patch, save_adapter
from actvar.distill.data import sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import Distillation, distill
from actvar.evaluate.predictions import DensePredictions
from actvar.families import family_of
from actvar.models.infinity import scale_schedule
from actvar.patching.patch import reconfigure
from actvar.sampling.token_maps import sampled_inputs
from actvar.utils.weight_override import own_parameters, replace_parameters, tuned_parameters
from actvar.zoo.pretrained import preset_path

LABELS = torch.tensor([1, 3, 0])
SPARSE = dict(token_rates=(0.5, 0.6), ffn_rate=0.5, num_experts=8)
FIXED = ActVARConfig(**SPARSE, guidance_until=-2, weights_from=-2)
CONFIG = replace(FIXED, guidance_strength=2.0)
BELOW = (0.0, 0.5, 1.5)


def perturb(model) -> None:
    """Put weights of an adapter in the place of the model's own."""
    generator = torch.Generator().manual_seed(6)
    own = {name: model.get_parameter(name).detach() for name in family_of(model).finetuned_names(model)}
    changed = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in own.items()}
    replace_parameters(model, {name: torch.nn.Parameter(value, requires_grad=False) for name, value in changed.items()})


@pytest.fixture
def var():
    var = make_tiny_var()
    apply_patch(var, CONFIG)
    perturb(var)
    return var


def draw(var, cfg, **arguments):
    return var.autoregressive_infer_cfg(3, LABELS, g_seed=4, cfg=cfg, **arguments)


@torch.no_grad()
def mixed(model, share):
    """Return a copy of `model` whose adapter holds the weights between, and does not follow the strength."""
    other = copy.deepcopy(model)
    own = own_parameters(other)
    for name, weight in tuned_parameters(other).items():
        weight.copy_(torch.lerp(own[name], weight, share))
    reconfigure(other, replace(model.actvar.config, guidance_strength=None))
    return other


@pytest.mark.parametrize("sampler", ["torch", "fast"])
def test_weights_lie_between_the_model_s_own_and_the_adapter_s(var, sampler):
    reconfigure(var, CONFIG, Execution(sampler=sampler))
    for cfg in BELOW:
        assert torch.equal(draw(var, cfg), draw(mixed(var, cfg / 2), cfg))
    assert not torch.equal(draw(var, 0.5), draw(mixed(var, 1.0), 0.5))


@pytest.mark.parametrize("cfg", [2.0, 3.0])
def test_from_the_adapter_s_strength_on_its_weights_stay_as_they_are(var, cfg):
    images = draw(var, cfg)
    reconfigure(var, FIXED)
    assert torch.equal(images, draw(var, cfg))


def test_eight_bits_multiply_the_weights_between(var):
    execution = Execution(weights="int8")
    reconfigure(var, CONFIG, execution)
    other = mixed(var, 0.5)
    reconfigure(other, other.actvar.config, execution)
    assert torch.equal(draw(var, 1.0), draw(other, 1.0))


def test_the_strength_may_come_by_place_or_by_default(var):
    by_name = draw(var, 1.5)
    assert torch.equal(var.autoregressive_infer_cfg(3, LABELS, 4), by_name)
    assert torch.equal(var.autoregressive_infer_cfg(3, LABELS, 4, 1.5), by_name)
    with pytest.raises((TypeError, ValueError), match="cfg: expected a"):
        draw(var, "strong")


def test_samples_leave_the_weights_and_the_file_alone(var, tmp_path):
    before = {name: weight.clone() for name, weight in tuned_parameters(var).items()}
    draw(var, 0.5)
    assert all(torch.equal(before[name], weight) for name, weight in tuned_parameters(var).items())
    save_adapter(var, tmp_path / "adapter.safetensors")
    images = draw(var, 0.5)
    remove_patch(var)
    load_adapter(var, tmp_path / "adapter.safetensors")
    assert var.actvar.config == CONFIG
    assert torch.equal(draw(var, 0.5), images)


def test_weights_between_are_made_once_and_follow_changes(var, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "lerp", lambda *of, lerp=torch.lerp: made.append(of) or lerp(*of))
    draw(var, 0.5)
    count = len(made)
    assert count == len(tuned_parameters(var))
    draw(var, 0.5)
    assert len(made) == count
    with torch.no_grad():
        var.head.weight.mul_(1.5)
    draw(var, 0.5)
    assert len(made) == count + 1
    monkeypatch.undo()
    for change in (var.head.weight, own_parameters(var)["blocks.0.ffn.fc1.weight"]):
        change.data.mul_(1.5)  # which PyTorch does not count
        assert torch.equal(draw(var, 0.5), draw(mixed(var, 0.25), 0.5))


def test_divergences_are_of_the_weights_between():
    var = make_tiny_var()
    inputs = torch.randn(3, var.L - var.first_l, var.Cvae, generator=torch.Generator().manual_seed(5))
    dense = DensePredictions(var, [(LABELS, inputs)], 1.0)
    apply_patch(var, CONFIG)
    perturb(var)
    assert dense.divergences(var) == dense.divergences(mixed(var, 0.5))


@pytest.mark.parametrize("preset", ["near", "fast"])
def test_weaker_guidance_brings_bundled_presets_nearer_to_dense(preset):
    _, var = load_pretrained("fashion-mnist")
    dense = DensePredictions(var, sampled_inputs(var, 16, 16, seed=1000, cfg=0.75), 0.75)
    load_adapter(var, preset_path("fashion-mnist", preset))
    between = dense.divergences(var)["kl_drawn"][-2:]
    reconfigure(var, replace(var.actvar.config, guidance_strength=None))
    assert sum(between) < 0.6 * sum(dense.divergences(var)["kl_drawn"][-2:])


def test_infinity_counts_the_strength_from_one():
    _, infinity = tiny_infinity()
    schedule = scale_schedule(size="0.06M")[:4]
    apply_patch(infinity, replace(CONFIG, guidance_strength=5.0))
    perturb(infinity)

    def sample(model, cfg):
        return model.sample(*tiny_text([3, 2]), schedule, cfg=cfg, g_seed=1)

    for cfg, share in ((1.0, 0.0), (3.0, 0.5), (5.0, 1.0), (9.0, 1.0), ((2.0, 7.0, 4.0, 2.0), 0.5)):
        assert torch.equal(sample(infinity, cfg), sample(mixed(infinity, share), cfg))


def test_a_training_for_guided_logits_notes_its_strength(tmp_path):
    var = make_tiny_var()
    how = Distillation(2, CONDITIONAL, epochs=1, batch=4, cfg=2.5)
    config = ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-2, weights_from=-2)
    distill(var, config, None, sampled_source(var, 4, 0), how, tmp_path / "adapter.safetensors")
    remove_patch(var)
    load_adapter(var, tmp_path / "adapter.safetensors")
    assert var.actvar.config == replace(config, guidance_strength=2.5)


@pytest.mark.parametrize(
    ("strength", "until"), [*itertools.product([0, -1.0, float("inf"), float("nan"), "1"], [-1]), (1.5, None)]
)
def test_a_strength_is_a_number_and_needs_an_end_of_guidance(strength, until):
    with pytest.raises((TypeError, ValueError), match="guidance_strength: expected"):
        ActVARConfig(guidance_strength=strength, guidance_until=until)
