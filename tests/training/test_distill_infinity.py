"""Distillation of Infinity: token maps drawn for texts, losses over bits, both stages with and without factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text
from torch.nn import functional as F

import actvar
from actvar.config import ActVARConfig
from actvar.distill import Stage1, Stage2, data
from actvar.distill.bits import as_bits, as_numbers
from actvar.distill.losses import output_loss
from actvar.families import family_of
from actvar.families.conditions import Texts
from actvar.models.infinity import layers, schedules
from actvar.patching.adapter import describe_adapter, gate_parameters
from actvar.sampling.token_maps import drawn_token_maps
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import run_in_processes
from actvar.utils.weight_override import tuned_parameters

CONFIG = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)
LATE = ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-1, weights_from=-1, num_experts=8)


def texts_of(*lengths: int) -> Texts:
    features, lengths_of = tiny_text(list(lengths))
    return Texts(features.split(lengths_of), TINY_SCHEDULE)


@pytest.fixture(autouse=True)
def rounds_nowhere(monkeypatch):
    """Leave out the rounding of cross-attention, which turns the last bit of a sum into one of bfloat16."""
    monkeypatch.setattr("actvar.models.infinity.layers.rounded", lambda x: x)


@pytest.fixture(params=[False, True], ids=["plain", "patchified"])
def infinity(request):
    return tiny_infinity(request.param)[1]


def batch(infinity) -> tuple[Texts, torch.Tensor, torch.Tensor]:
    """Return texts, inputs and bits of four images of the dense model."""
    _, dense = tiny_infinity(infinity.spatial_patchify)
    texts = texts_of(3, 5, 2, 4)
    bits = drawn_token_maps(dense, texts, 3, 3.0)
    return texts, family_of(dense).teacher_input(dense, texts, bits), bits


@pytest.mark.parametrize("count", [1, 4, 15, 32, 56])
def test_bits_survive_as_numbers(count):
    bits = torch.randint(2, (3, 7, count), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    numbers = as_numbers(bits)
    assert numbers.shape == (3, 7)
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < 2**count
    assert torch.equal(as_bits(numbers, count), bits)


def test_more_bits_than_a_number_has_are_refused():
    with pytest.raises(ValueError, match="bits: expected at most 63 of a token, got 64"):
        as_numbers(torch.zeros(1, 64))


def test_token_maps_are_the_bits_that_the_dense_model_draws(infinity, tmp_path):
    texts = texts_of(3, 5)
    source = data.sampled_source(infinity, 5, seed=2, texts=texts)
    source = replace(source, at_once=2)
    tokens = data.cached_tokens(source, infinity, tmp_path)
    assert tokens.dtype == (torch.int32 if infinity.spatial_patchify else torch.int16)
    index = torch.tensor([2, 3])
    conditions, inputs, bits = data.examples(infinity, source, tokens, index)
    assert all(torch.equal(a, b) for a, b in zip(conditions.features, texts.features, strict=True))
    expected = drawn_token_maps(infinity, texts, 2 * 1_000_003 + 2, 4.0)
    assert torch.equal(bits, expected)
    assert torch.equal(inputs, family_of(infinity).teacher_input(infinity, texts, expected))
    assert torch.equal(data.cached_tokens(source, infinity, tmp_path), tokens)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_texts_maps_and_temperatures_have_other_files(infinity, tmp_path):
    texts = texts_of(3, 5)
    others = (texts, texts[:1], replace(texts, tau=1.0), replace(texts, schedule=TINY_SCHEDULE[:2]))
    for number, other in enumerate(others, start=1):
        data.cached_tokens(data.sampled_source(infinity, 4, seed=2, texts=other), infinity, tmp_path)
        assert len(list(tmp_path.iterdir())) == number


def test_large_maps_are_drawn_one_after_the_other():
    _, infinity = tiny_infinity()
    for size, at_once in (("1M", 1), ("0.06M", 31)):
        texts = replace(texts_of(3), schedule=schedules.scale_schedule(size=size))
        assert data.sampled_source(infinity, 4, 0, texts).at_once == at_once


def test_texts_and_classes_are_asked_for_by_name(tiny_var):
    _, infinity = tiny_infinity()
    with pytest.raises(TypeError, match="draws from classes, such as VAR, got Infinity; it draws from texts"):
        data.sampled_source(infinity, 4, 0)
    with pytest.raises(TypeError, match="texts: expected None, since VAR draws from classes"):
        data.sampled_source(tiny_var, 4, 0, texts_of(3))


def test_stage_one_trains_the_gates_and_nothing_else(infinity):
    module = Stage1(actvar.apply_patch(infinity, CONFIG))
    texts, inputs, bits = batch(infinity)
    losses = module(texts, inputs, bits)
    with torch.no_grad():
        logits = infinity(*texts.joined(), inputs, TINY_SCHEDULE) / texts.tau
    pairs = logits.unflatten(-1, (-1, 2))
    expected = F.cross_entropy(pairs.permute(0, 3, 1, 2), bits.long())
    torch.testing.assert_close(losses["cls"], expected, atol=1e-4, rtol=1e-4)
    losses["loss"].backward()
    with_gradient = {name for name, p in infinity.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    gates = {p for name, p in gate_parameters(infinity).items() if name.endswith("weight")}
    assert gates <= {infinity.get_parameter(name) for name in with_gradient}
    assert all(".actvar." in name for name in with_gradient)


def test_stage_one_lowers_its_distillation_losses(infinity):
    module = Stage1(actvar.apply_patch(infinity, CONFIG))
    arguments = batch(infinity)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(15):
        losses = module(*arguments)
        history.append((losses["router"] + losses["selector"]).item())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert history[-1] < 0.8 * history[0]


def test_the_losses_are_those_of_the_dense_and_the_patched_model(infinity):
    texts, inputs, bits = batch(infinity)
    _, dense = tiny_infinity(infinity.spatial_patchify)
    module = Stage2(actvar.apply_patch(infinity, CONFIG), ("cls", "block", "output", "guided"), cfg=3.0)
    with torch.no_grad():
        for parameter in tuned_parameters(infinity).values():
            parameter.mul_(0.9)
        family = family_of(dense)
        both = family.with_unconditional(dense, texts)
        outputs: dict[str, list] = {"ours": [], "theirs": []}
        logits = {}
        for name, model in (("ours", infinity), ("theirs", dense)):
            blocks = model.unregistered_blocks
            handles = [b.register_forward_hook(lambda _, __, y, n=name: outputs[n].append(y)) for b in blocks]
            logits[name] = model(*both.joined(), inputs.repeat(2, 1, 1), TINY_SCHEDULE).unflatten(-1, (-1, 2)) / 0.5
            for handle in handles:
                handle.remove()
        losses = module(texts, inputs, bits)
    pairs = list(zip(outputs["ours"], outputs["theirs"], strict=True))
    block = sum((a - b).square().mean() for a, b in pairs) / len(pairs)
    torch.testing.assert_close(losses["block"], block, atol=1e-5, rtol=1e-4)

    def divergence(ours, theirs):
        return (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).mean()

    torch.testing.assert_close(losses["output"], divergence(logits["ours"], logits["theirs"]), atol=1e-4, rtol=1e-4)
    (ours, ours_without), (theirs, theirs_without) = logits["ours"].chunk(2), logits["theirs"].chunk(2)
    guided = divergence(3 * ours - 2 * ours_without, 3 * theirs - 2 * theirs_without)  # a strength of 3 counts from 1
    torch.testing.assert_close(losses["guided"], guided, atol=1e-4, rtol=1e-4)
    expected = F.cross_entropy(ours.permute(0, 3, 1, 2), bits.long())
    torch.testing.assert_close(losses["cls"], expected, atol=1e-4, rtol=1e-4)
    total = losses["cls"] + losses["block"] + losses["output"] + losses["guided"]
    torch.testing.assert_close(losses["loss"], total)


@pytest.mark.parametrize("lora", [None, 3], ids=["whole", "factors"])
@pytest.mark.parametrize("losses", [("cls", "block", "output"), ("output", "guided")], ids=str)
def test_stage_two_trains_its_weights_and_nothing_else_and_its_file_is_the_model(infinity, tmp_path, lora, losses):
    before = {name: tensor.clone() for name, tensor in infinity.state_dict().items()}
    module = Stage2(actvar.apply_patch(infinity, CONFIG), losses, cfg=3.0, lora=lora)
    arguments = batch(infinity)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if lora is None:
        names = {f"var.{name}" for name in family_of(infinity).finetuned_names(infinity)}
        assert trained.keys() == names
    else:
        assert all(name.startswith("low_rank.") for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    history = []
    for _ in range(8):
        loss = module(*arguments)["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for name, p in trained.items() if "zero_k_bias" not in name)
    assert history[-1] < 0.9 * history[0]
    module.finish()
    actvar.save_adapter(infinity, tmp_path / "adapter.safetensors")
    assert describe_adapter(tmp_path / "adapter.safetensors")["rank"] == lora
    _, other = tiny_infinity(infinity.spatial_patchify)
    actvar.load_adapter(other, tmp_path / "adapter.safetensors")
    features, lengths = arguments[0].joined()
    images = [model.eval().sample(features, lengths, TINY_SCHEDULE, g_seed=1) for model in (infinity, other)]
    assert torch.equal(*images)
    actvar.remove_patch(infinity)
    assert all(torch.equal(before[name], tensor) for name, tensor in infinity.state_dict().items())


@pytest.mark.parametrize("losses", [("cls", "block", "output"), ("output", "guided")], ids=str)
def test_gradients_of_factors_follow_from_those_of_whole_weights(infinity, losses):
    module = Stage2(actvar.apply_patch(infinity, CONFIG), losses, lora=3)
    _, twin = tiny_infinity(infinity.spatial_patchify)
    whole = Stage2(actvar.apply_patch(twin, CONFIG), losses)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for factor in module.low_rank.B:
            factor.normal_(0, 0.1, generator=generator)
        for name, weight in module.low_rank.weights(infinity).items():
            tuned_parameters(twin)[name].copy_(weight)
    arguments = batch(infinity)
    found, due = module(*arguments), whole(*arguments)
    assert all(torch.equal(found[name], due[name]) for name in due)
    found["loss"].backward()
    due["loss"].backward()
    for name, (A, B) in module.low_rank.factors().items():
        gradient = tuned_parameters(twin)[name].grad
        torch.testing.assert_close(A.grad, B.T @ gradient, atol=1e-6, rtol=1e-3, msg=name)
        torch.testing.assert_close(B.grad, gradient @ A.T, atol=1e-6, rtol=1e-3, msg=name)


def test_gradients_are_the_slopes_of_the_loss(infinity):
    """All tokens and experts are on, since a choice that changes is a step and no slope."""
    config = ActVARConfig(token_rates=(1, 1), ffn_rate=1, num_experts=8, always_sparse=True)
    module = Stage2(actvar.apply_patch(infinity, config), ("cls", "block", "output", "guided"), cfg=3.0)
    arguments = batch(infinity)
    weights = tuned_parameters(infinity)
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.9)
    block = "blocks.0" if hasattr(infinity, "blocks") else "block_chunks.1.module.0"
    names = [f"{block}.sa.mat_qkv.weight", f"{block}.ffn.fc1.weight", f"{block}.ffn.fc2.weight", "head.weight"]
    gradients = torch.autograd.grad(module(*arguments)["loss"], [weights[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        direction = gradient / gradient.norm()
        with torch.no_grad():
            values = []
            for step in (1e-2, -1e-2):
                weights[name].add_(direction, alpha=step)
                values.append(module(*arguments)["loss"].item())
                weights[name].sub_(direction, alpha=step)
        assert gradient.norm().item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05), name


@pytest.mark.parametrize("lora", [None, 3], ids=["whole", "factors"])
def test_conditional_rows_alone_learn_the_guided_logits_of_the_teacher(lora):
    _, infinity = tiny_infinity()
    _, dense = tiny_infinity()
    texts, inputs, bits = batch(infinity)
    stage = Stage2(actvar.apply_patch(infinity, LATE), ("guided",), cfg=3.0, lora=lora).train()
    losses = stage(texts, inputs, bits)
    with torch.no_grad():
        both = family_of(dense).with_unconditional(dense, texts)
        teacher = dense(*both.joined(), inputs.repeat(2, 1, 1), TINY_SCHEDULE).unflatten(-1, (-1, 2)) / 0.5
    conditional, other = teacher[:, -12:].chunk(2)
    expected = output_loss(conditional, 3 * conditional - 2 * other)
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(10):
        loss = stage(texts, inputs, bits)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * losses["loss"]


def test_teacher_and_student_leave_out_the_same_texts():
    _, infinity = tiny_infinity()
    module = Stage2(actvar.apply_patch(infinity, ActVARConfig(token_rates=(1, 1), ffn_rate=1, num_experts=8))).train()
    infinity.cond_drop_rate = 0.5
    torch.manual_seed(0)
    losses = module(*batch(infinity))
    assert losses["output"].item() == pytest.approx(0, abs=1e-5)
    infinity.cond_drop_rate = 0.0
    assert module(*batch(infinity))["cls"].item() != pytest.approx(losses["cls"].item(), rel=1e-4)


def test_autocast_trains_as_float32_does_to_rounding(infinity):
    module = Stage2(actvar.apply_patch(infinity, CONFIG), lora=3)
    arguments = batch(infinity)
    exact = module(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(*arguments)
    torch.testing.assert_close(rounded["cls"], exact["cls"], atol=0.05, rtol=0.05)
    rounded["loss"].backward()
    assert all(factor.grad.isfinite().all() for factor in module.low_rank.parameters())


def _train(folder) -> None:
    layers.rounded = lambda x: x  # in a process of its own too, see `rounds_nowhere`
    _, infinity = tiny_infinity()
    module = Stage2(actvar.apply_patch(infinity, CONFIG), lora=3)
    infinity.cond_drop_rate = 0.0
    texts, inputs, bits = batch(infinity)
    plan = Plan("stage2", folder, 1, batch=4, lr=1e-3, warmup=1, bf16=False, clip=1e9)
    gradients = {}

    def keep(_step):
        gradients.update({name: p.grad.clone() for name, p in module.low_rank.named_parameters()})

    fit(module, lambda m, i: m(texts.take(i.tolist()), inputs[i], bits[i]), plan, 4, after_step=keep)
    torch.save(gradients, folder / "gradients.pt")


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_on_the_joint_batch(tmp_path):
    gradients = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run_in_processes(_train, processes, folder)
        gradients.append(torch.load(folder / "gradients.pt", weights_only=True))
    one, two = gradients
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=2e-3 * float(gradient.abs().max()), rtol=0, msg=name)
