"""Adapters without training for Infinity: what it is fitted to, the fits, and plans by measured time."""

from dataclasses import replace

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text

import actvar
from actvar.calibrate import calibrate
from actvar.calibrate.goal import Goal
from actvar.calibrate.plan import plan
from actvar.calibrate.sensitivity import divergence_per_block
from actvar.calibrate.times import SampleTimes, ScaleTimes
from actvar.config import ActVARConfig
from actvar.evaluate.divergence import divergence_by_scale, token_divergence
from actvar.evaluate.predictions import DensePredictions, predictions
from actvar.families import family_of
from actvar.families.conditions import Texts
from actvar.sampling.token_maps import drawn_token_maps, sampled_inputs

CONFIG = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)
CFG = 3.0


def texts_of(*lengths: int, schedule=TINY_SCHEDULE) -> Texts:
    features, lengths_of = tiny_text(list(lengths))
    return Texts(features.split(lengths_of), schedule)


@pytest.fixture(autouse=True)
def rounds_nowhere(monkeypatch):
    """Leave out the rounding of cross-attention, which turns the last bit of a sum into one of bfloat16."""
    monkeypatch.setattr("actvar.models.infinity.layers.rounded", lambda x: x)


@pytest.fixture(params=[False, True], ids=["plain", "patchified"])
def infinity(request):
    return tiny_infinity(request.param)[1]


def test_logits_of_scales_are_those_that_bits_were_drawn_from(infinity):
    texts, family = texts_of(3, 5), family_of(infinity)
    bits = drawn_token_maps(infinity, texts, 4, CFG)
    inputs = family.teacher_input(infinity, texts, bits)
    features, lengths = texts.joined()
    recorded = []
    draw_bits = infinity.draw_bits

    def record(scale, logits, draw, rng):
        recorded.append(logits.clone())
        return draw_bits(scale, logits, draw, rng)

    infinity.draw_bits = record
    infinity.sample(features, lengths, texts.schedule, cfg=CFG, tau=texts.tau, g_seed=4)
    for scale, logits in predictions(infinity, texts, inputs):
        strength = family.strength(CFG, scale, len(texts.schedule))
        conditional, other = logits.chunk(2)
        expected = recorded[scale].view(2, -1, *conditional.shape[2:])
        torch.testing.assert_close((1 + strength) * conditional - strength * other, expected, rtol=1e-4, atol=1e-4)


def test_teacher_forcing_of_rows_with_and_without_their_text_equals_scale_after_scale(infinity):
    texts, family = texts_of(3, 5), family_of(infinity)
    inputs = family.teacher_input(infinity, texts, drawn_token_maps(infinity, texts, 4, CFG))
    both = family.with_unconditional(infinity, texts)
    forced = family.predicted(infinity, both, inputs.repeat(2, 1, 1))
    by_scale = torch.cat([logits for _, logits in predictions(infinity, texts, inputs)], dim=1)
    torch.testing.assert_close(by_scale, forced, rtol=1e-4, atol=1e-4)


def test_bits_of_a_token_add_up_in_its_divergence():
    logits, others = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 4, 2)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=others)
    )
    torch.testing.assert_close(token_divergence(logits, others), expected.sum(dim=-1))


def test_sensitivity_is_the_divergence_of_one_sparse_block(infinity):
    actvar.apply_patch(infinity, CONFIG)
    texts, family = texts_of(3, 5), family_of(infinity)
    inputs = family.teacher_input(infinity, texts, drawn_token_maps(infinity, texts, 4, CFG))
    found = divergence_per_block(infinity, CONFIG, texts, inputs)
    for block in range(infinity.depth):
        one = tuple(0.75 if b == block else 1.0 for b in range(infinity.depth))
        actvar.apply_patch(infinity, replace(CONFIG, token_rates=(one, one), ffn_rate=1.0))
        tokens = divergence_by_scale(infinity, [(texts, inputs)])
        for scale in (1, 2):
            assert found[block][scale][0] == pytest.approx(tokens[scale], rel=1e-3)


def test_a_fitted_adapter_keeps_the_budget_and_loads_into_another_model(infinity, tmp_path):
    texts = texts_of(3, 5, 2, 4)
    report = calibrate(infinity, CONFIG, images=8, texts=texts)
    assert report.flops["chosen"] <= report.flops["budget"] < report.flops["dense"]
    assert {k.scale for k in report.kept} == {"2x2", "3x4"}
    actvar.save_adapter(infinity, tmp_path / "adapter.safetensors")
    _, other = tiny_infinity(infinity.spatial_patchify)
    actvar.load_adapter(other, tmp_path / "adapter.safetensors")
    features, lengths = texts.joined()
    images = [m.sample(features, lengths, texts.schedule, g_seed=1) for m in (infinity, other)]
    assert torch.equal(*images)


def test_fitted_gates_lose_less_than_those_of_a_fresh_patch(infinity):
    texts = texts_of(3, 5, 2, 4)
    held_out = sampled_inputs(infinity, 8, 4, 77, CFG, texts)
    actvar.apply_patch(infinity, CONFIG)
    fresh = sum(divergence_by_scale(infinity, held_out))
    calibrate(infinity, CONFIG, images=16, texts=texts)
    assert sum(divergence_by_scale(infinity, held_out)) < fresh


def test_a_plan_takes_tokens_experts_and_guidance_by_their_times(monkeypatch):
    def times(*_):
        of_scale = {
            (guided, scale): ScaleTimes(*3 * [[rows, 0.8 * rows, 0.6 * rows]])
            for guided, rows in ((True, 2.0), (False, 1.0))
            for scale in (1, 2)
        }
        return [SampleTimes(8.0, of_scale)]

    monkeypatch.setattr("actvar.calibrate.plan.measured_times", times)
    _, infinity = tiny_infinity()
    texts = texts_of(3, 5, 2, 4)
    levers = ["tokens", "experts", "guidance"]
    report = plan(infinity, Goal(kl=0.5), levers, texts=texts, images=8, batch=2, num_experts=8, repeats=1)
    assert report.is_met
    assert report.chosen.divergence <= 0.5
    configs = [each.config for each in report.curve]
    assert any(config.guidance_until == -2 for config in configs)
    assert any(min(map(min, config.token_rates)) < 1 for config in configs)
    assert any(min(map(min, config.ffn_rate)) < 1 for config in configs)


def test_divergences_without_a_text_are_those_of_guidance_left_out():
    _, infinity = tiny_infinity()
    texts = texts_of(3, 5)
    batches = sampled_inputs(infinity, 4, 2, 5, CFG, texts)
    dense = DensePredictions(infinity, batches, CFG)
    expected = dense.divergences_without_guidance()
    actvar.apply_patch(infinity, ActVARConfig(token_rates=(1, 1), ffn_rate=1, num_experts=8, guidance_until=-2))
    found = dense.divergences(infinity)["kl_drawn"]
    assert found[0] == pytest.approx(0, abs=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-3)


def test_what_images_are_drawn_from_is_asked_for_by_name(tiny_var):
    _, infinity = tiny_infinity()
    with pytest.raises(TypeError, match="draws from classes, such as VAR, got Infinity; it draws from texts"):
        calibrate(infinity, CONFIG)
    with pytest.raises(TypeError, match="texts: expected None, since VAR draws from classes"):
        calibrate(tiny_var, ActVARConfig(num_experts=8), texts=texts_of(3))
    with pytest.raises(TypeError, match="expected texts"):
        family_of(infinity).predicted(infinity, torch.tensor([1]), torch.zeros(1, 2, 4))
