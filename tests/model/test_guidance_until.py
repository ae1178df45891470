"""Scales without guidance compute the conditional rows alone, and an adapter's weights may begin at a later scale."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import make_tiny_var
from support.toy_family import STARTS, ToyFamily, ToyModel

import actvar.families
import actvar.models.var as var_module
from actvar import (
    ActVARConfig,
    Execution,
    apply_patch,
    guided_rows,
    load_adapter,
    patched,
    refresh,
    remove_patch,
    save_adapter,
)
from actvar.config import DENSE
from actvar.families import family_of
from actvar.families.var import VARFamily
from actvar.flops import counted_flops, model_flops
from actvar.models.token_draw import guided
from actvar.patching.patch import patch_silently
from actvar.utils.weight_override import own_parameters, replace_parameters
from actvar_kernels.backend import using_backend

LABELS = torch.tensor([1, 3, 0])
ALL = dict(token_rates=(1, 1), ffn_rate=1)
SPARSE = dict(token_rates=(0.5, 0.6), ffn_rate=0.5, num_experts=8)


def draw(var, **arguments):
    return var.autoregressive_infer_cfg(3, LABELS, g_seed=4, **({"cfg": 3.0} | arguments))


def inputs_of(var):
    return torch.randn(3, var.L - var.first_l, var.Cvae, generator=torch.Generator().manual_seed(5))


def perturb(var, names=None):
    """Put other weights in the place of the model's own, as an adapter of stage 2 does."""
    generator = torch.Generator().manual_seed(6)
    names = family_of(var).finetuned_names(var)
    own = {name: var.get_parameter(name).detach() for name in names}
    noise = {name: torch.randn(value.shape, generator=generator).to(value.dtype) for name, value in own.items()}
    changed = {name: torch.nn.Parameter(own[name] * (1 + 0.2 * noise[name]), requires_grad=False) for name in names}
    replace_parameters(var, changed)


@torch.no_grad()
def scale_logits(var, inputs):
    with var.actvar.sampling(var, in_place=False):
        return [logits for _, logits in family_of(var).scale_logits(var, LABELS, inputs)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("arguments", [{}, {"top_k": 9, "top_p": 0.8}, {"more_smooth": True}], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_images_are_those_of_the_dense_model_with_strength_0_in_the_last_scales(count, arguments, backend, monkeypatch):
    var = make_tiny_var()
    first = len(var.patch_nums) - count
    own = var_module.guided
    strengths = iter(range(len(var.patch_nums)))
    with monkeypatch.context() as patch:
        patch.setattr(var_module, "guided", lambda logits, t: own(logits, t if next(strengths) < first else 0.0))
        expected = draw(var, **arguments)
    with using_backend(backend), patched(var, ActVARConfig(**ALL, guidance_until=-count)):
        # mixed codes change with the rounding of logits, which a low temperature enlarges; drawn tokens are the same
        atol = 1e-4 if "more_smooth" in arguments else 1e-5
        torch.testing.assert_close(draw(var, **arguments), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("config", [ALL, SPARSE, SPARSE | {"kv": "all"}, SPARSE | {"fixed_tokens": True}], ids=str)
def test_conditional_rows_are_computed_as_with_guidance(config, backend, dtype):
    var = make_tiny_var().to(dtype)
    inputs = inputs_of(var)
    with using_backend(backend):
        apply_patch(var, ActVARConfig(**config))
        expected = scale_logits(var, inputs)
        apply_patch(var, ActVARConfig(**config, guidance_until=-2))
        found = scale_logits(var, inputs)
    for scale, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours[:3], theirs[:3], atol=tolerance, rtol=tolerance)
        same = scale < len(found) - 2
        other = theirs[3:] if same else ours[:3]
        torch.testing.assert_close(ours[3:], other, atol=tolerance if same else 0, rtol=tolerance if same else 0)


def test_the_shared_selection_of_conditional_rows_alone_is_their_own():
    var = make_tiny_var()
    inputs = inputs_of(var)
    apply_patch(var, ActVARConfig(**SPARSE, share_cfg_selection=True))
    expected = scale_logits(var, inputs)
    apply_patch(var, ActVARConfig(**SPARSE, share_cfg_selection=True, guidance_until=-1))
    found = scale_logits(var, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:3], theirs[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("execution", [Execution(), Execution(sampler="fast")], ids=str)
def test_seeds_give_the_same_images_twice_and_removal_those_of_before(execution):
    var = make_tiny_var()
    dense = draw(var)
    apply_patch(var, ActVARConfig(**SPARSE, guidance_until=-2), execution)
    first = draw(var)
    assert torch.equal(draw(var), first)
    assert not torch.equal(first, dense)
    remove_patch(var)
    assert torch.equal(draw(var), dense)


@pytest.mark.parametrize("guidance_until", [None, -2, -1])
@pytest.mark.parametrize("config", [ALL, SPARSE], ids=str)
@pytest.mark.parametrize("weights_from", [None, -1])
def test_flops_are_those_of_the_rows_that_are_computed(config, guidance_until, weights_from):
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**config, guidance_until=guidance_until, weights_from=weights_from))
    perturb(var)
    assert model_flops(var, 3) == counted_flops(var, 3)


def test_an_own_loop_has_to_say_that_its_rows_are_guided():
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**ALL, guidance_until=-1))
    arguments = var, torch.cat((LABELS, torch.full_like(LABELS, var.num_classes))), inputs_of(var)
    with torch.no_grad(), pytest.raises(ValueError, match=r"guidance_until: .* open actvar.guided_rows"):
        list(family_of(var).scale_logits(*arguments[:1], LABELS, arguments[2]))
    with torch.no_grad(), guided_rows(var):
        *_, (_, logits) = family_of(var).scale_logits(var, LABELS, arguments[2])
    torch.testing.assert_close(guided(logits, 2.0), logits[:3])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("guidance_until", 0, "expected at least the first scale with guidance"),
        ("guidance_until", 9, "the model has 4 scales, got index 9"),
        ("weights_from", -5, "the model has 4 scales, got index -5"),
    ],
)
def test_scales_outside_the_model_are_refused(field, value, message):
    with pytest.raises(ValueError, match=f"{field}: {message}"):
        apply_patch(make_tiny_var(), ActVARConfig(**{field: value}))
    with pytest.raises(TypeError, match=field):
        ActVARConfig(**{field: 0.5})


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("config", [ALL, SPARSE], ids=str)
def test_the_weights_of_an_adapter_begin_at_their_scale(config, backend):
    """The scales before are the dense model's; the others equal the dense model with new weights and its own K/V."""
    var, other = make_tiny_var(), make_tiny_var()
    inputs = inputs_of(var)
    rates = {"scales": (-2, -1)} | config
    with using_backend(backend):
        apply_patch(other, ActVARConfig(**rates))
        before = scale_logits(other, inputs)
        apply_patch(var, ActVARConfig(**rates, weights_from=-2))
        perturb(var)
        for _ in range(2):  # the second sample begins with packed copies of both
            found = scale_logits(var, inputs)
        first = len(found) - 2
        for ours, theirs in zip(found[:first], before, strict=False):
            assert torch.equal(ours, theirs)
        expected = late_logits(other, inputs, first)
    for ours, theirs in zip(found[first:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def late_logits(var, inputs, first):
    """Return the logits from scale `first` on, where other weights are put into the model while it samples."""
    found = []
    with var.actvar.sampling(var, in_place=False):
        for scale, logits in family_of(var).scale_logits(var, LABELS, inputs):
            if scale >= first:
                found.append(logits)
            if scale == first - 1:
                perturb(var)
                for block in var.blocks:
                    block.actvar.cache.forget()
    return found


def test_an_adapter_keeps_where_its_weights_and_the_end_of_guidance_are(tmp_path):
    var = make_tiny_var()
    config = ActVARConfig(**SPARSE, guidance_until=-2, weights_from=-2)
    apply_patch(var, config)
    perturb(var)
    images = draw(var)
    save_adapter(var, tmp_path / "adapter.safetensors")
    remove_patch(var)
    load_adapter(var, tmp_path / "adapter.safetensors")
    assert var.actvar.config == config
    assert torch.equal(draw(var), images)


def test_a_change_of_the_model_s_own_weights_counts_at_early_scales():
    var, other = make_tiny_var(), make_tiny_var()
    for model in (var, other):
        apply_patch(model, ActVARConfig(**ALL, weights_from=-1))
        perturb(model)
    draw(var)
    for model in (var, other):
        for name in ("blocks.0.ffn.fc1.weight", "head.weight"):
            own_parameters(model)[name].data.mul_(1.5)
    refresh(var)
    assert torch.equal(draw(var), draw(other))


def test_teacher_forcing_runs_scale_by_scale_where_weights_differ_and_has_gradients():
    var = make_tiny_var()
    inputs = inputs_of(var)
    apply_patch(var, ActVARConfig(**SPARSE, guidance_until=-2, weights_from=-2))
    perturb(var)
    expected = torch.cat([logits[:3] for logits in scale_logits(var, inputs)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(var(LABELS, inputs), expected, atol=1e-4, rtol=1e-4)
    weight = var.blocks[0].ffn.fc1.weight.requires_grad_(True)
    var(LABELS, inputs)[:, : -(5 * 5 + 3 * 3)].square().mean().backward()
    assert not weight.grad.any()
    var(LABELS, inputs).square().mean().backward()
    assert weight.grad.abs().max() > 0
    call = family_of(var).embedded(var, LABELS, inputs).call
    with pytest.raises(ValueError, match=r"weights_from: .* run scale by scale"):
        var.blocks[0](**family_of(var).block_arguments(call))


@pytest.fixture
def toy(monkeypatch) -> ToyModel:
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    return ToyModel().eval()


@torch.no_grad()
@pytest.mark.parametrize("config", [ALL, SPARSE], ids=str)
def test_another_family_leaves_out_guidance_too(toy, config):
    inputs = torch.randn(3, STARTS[-1] - 1 + 15, 4, generator=torch.Generator().manual_seed(5))
    apply_patch(toy, ActVARConfig(**config))
    expected = scale_logits(toy, inputs)
    apply_patch(toy, ActVARConfig(**config, guidance_until=-2, weights_from=-1))
    found = scale_logits(toy, inputs)
    assert [len(logits) for logits in found] == [6, 6, 3, 3]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[:3], theirs[:3], atol=1e-5, rtol=1e-5)
    ours, theirs = toy(LABELS, inputs), torch.cat([logits[:3] for logits in expected], 1)
    exact = copy.deepcopy(toy).double()(LABELS, inputs.double())
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()
    first = toy.autoregressive_infer_cfg(3, LABELS, g_seed=1)
    assert torch.equal(toy.autoregressive_infer_cfg(3, LABELS, g_seed=1), first)


def test_a_family_that_cannot_is_refused_by_name(toy, monkeypatch):
    monkeypatch.setattr(ToyFamily, "leaves_out_guidance", False)
    with pytest.raises(ValueError, match="guidance_until: toy does not sample without"):
        patch_silently(toy, ActVARConfig(guidance_until=-1))


def test_the_lossless_end_is_the_dense_model():
    var = make_tiny_var()
    apply_patch(var, DENSE)
    dense = draw(var)
    apply_patch(var, ActVARConfig(**ALL, guidance_until=None, weights_from=None))
    assert torch.equal(draw(var), dense)


@pytest.mark.parametrize("part", ["attn", "ffn", "ln_wo_grad", "attn.proj", "ada_lin"])
@pytest.mark.parametrize("config", [ALL, {"token_rates": (0.5, 0.6), "ffn_rate": 1}], ids=str)
def test_layers_that_are_called_compute_the_conditional_rows_too(part, config):
    if part == "ln_wo_grad" and config is not ALL:
        pytest.skip("a selector has to read the norm")
    var, other = make_tiny_var(), make_tiny_var()
    inputs = inputs_of(var)
    for model in (var, other):
        apply_patch(model, ActVARConfig(**config, guidance_until=-2, weights_from=-1))
        perturb(model)
    for block in other.blocks:
        block.get_submodule(part).register_forward_hook(lambda *_: None)
    for ours, theirs in zip(scale_logits(other, inputs), scale_logits(var, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"guidance_until": -2}, {"weights_from": -1}], ids=str)
def test_a_compiled_block_draws_the_same_images(fields):
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(**ALL, **fields))
    perturb(var)
    expected = draw(var)
    var.blocks[0] = torch.compile(var.blocks[0], backend="eager", dynamic=False)
    torch.testing.assert_close(draw(var), expected, atol=1e-5, rtol=0)
