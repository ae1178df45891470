from __future__ import annotations

import math

import pytest
import torch
from support.helpers import make_tiny_var
from torch.nn import functional as F

from actvar import ActVARConfig, apply_patch, remove_patch
from actvar.distill import Stage2
from actvar.distill.losses import block_loss, guided_loss, output_loss
from actvar.families.var import VARFamily
from actvar.patching.adapter import gate_parameters
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import run_in_processes
from actvar.utils.weight_override import tuned_parameters

CONFIG = ActVARConfig(num_experts=8)
BATCH = 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(var):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, var.L - 1, 8, generator=generator)
    return torch.tensor([0, 4, 9, 2]), inputs, torch.randint(64, (BATCH, var.L), generator=generator)


def student(**changes):
    return Stage2(apply_patch(make_tiny_var(**changes), CONFIG))


def test_block_loss_is_the_mean_of_squares_over_everything():
    student, teacher = [normal(2, 3, 4, seed=s) for s in (0, 1)], [normal(2, 3, 4, seed=s) for s in (2, 3)]
    total = 0.0
    for a, b in zip(student, teacher, strict=True):
        for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            total += (x - y) ** 2
    assert block_loss(student, teacher).item() == pytest.approx(total / 48, rel=1e-6)


def test_output_loss_is_the_divergence_of_the_student_from_the_teacher():
    logits, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    total = 0.0
    for b in range(2):
        for t in range(3):
            q, p = ([math.exp(v) for v in row[b, t].tolist()] for row in (logits, teacher))
            q, p = ([v / sum(row) for v in row] for row in (q, p))
            total += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    assert output_loss(logits, teacher).item() == pytest.approx(total / 6, rel=1e-9)


def test_guided_loss_is_the_divergence_of_what_is_drawn_from():
    logits, teacher, strength = normal(4, 3, 5), normal(4, 3, 5, seed=1), torch.tensor([[0.0], [0.5], [1.5]])
    total = 0.0
    for b in range(2):
        for t in range(3):
            q, p = (
                [
                    math.exp((1 + float(strength[t, 0])) * c - float(strength[t, 0]) * u)
                    for c, u in zip(rows[b, t].tolist(), rows[b + 2, t].tolist(), strict=True)
                ]
                for rows in (logits, teacher)
            )
            q, p = ([v / sum(row) for v in row] for row in (q, p))
            total += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    assert guided_loss(logits, teacher, strength, strength).item() == pytest.approx(total / 6, rel=1e-5)


def test_gradients_of_the_losses_are_right():
    logits, teacher = normal(2, 3, 5).requires_grad_(), normal(2, 3, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: output_loss(x, teacher), logits)
    output = normal(2, 3, 4).requires_grad_()  # block_loss is in float32: the analytic gradient instead of differences
    block_loss([output, normal(2, 3, 4, seed=1)], [normal(2, 3, 4, seed=2)] * 2).backward()
    torch.testing.assert_close(output.grad, (output.detach() - normal(2, 3, 4, seed=2)) / 24, atol=1e-7, rtol=1e-6)


def test_the_losses_are_those_of_the_dense_and_the_patched_model():
    module, dense = student(), make_tiny_var()
    with torch.no_grad():
        for parameter in tuned_parameters(module.var).values():
            parameter.mul_(0.9)
        labels, inputs, tokens = batch(dense)
        outputs = {}
        for name, model in (("student", module.var), ("teacher", dense)):
            outputs[name] = []
            handles = [b.register_forward_hook(lambda _, __, y, n=name: outputs[n].append(y)) for b in model.blocks]
            outputs[name].append(model(labels, inputs))
            for handle in handles:
                handle.remove()
        losses = module(labels, inputs, tokens)
    (*ours, logits), (*theirs, teacher_logits) = outputs["student"], outputs["teacher"]
    block = sum((a - b).square().mean() for a, b in zip(ours, theirs, strict=True)) / len(ours)
    p, log_q = teacher_logits.softmax(-1), logits.log_softmax(-1)
    output = (p * (p.log() - log_q)).sum(-1).mean()
    cls = F.cross_entropy(logits.transpose(1, 2), tokens)
    torch.testing.assert_close(
        torch.stack([losses["block"], losses["output"], losses["cls"]]), torch.stack([block, output, cls])
    )
    torch.testing.assert_close(losses["loss"], cls + block + output)
    assert block > 1e-3
    module.losses = ("output",)
    torch.testing.assert_close(module(labels, inputs, tokens)["loss"], output)


def test_guidance_is_that_of_sampling_and_drops_no_label():
    dense = make_tiny_var()
    module = Stage2(apply_patch(make_tiny_var(), CONFIG), ("output", "guided"), cfg=3.0).train()
    labels, inputs, tokens = batch(dense)
    both = torch.cat((labels, torch.full_like(labels, dense.num_classes)))
    with torch.no_grad():
        logits, teacher = (model(both, inputs.repeat(2, 1, 1)) for model in (module.var.eval(), dense))
        scales = [scale for scale, side in enumerate(dense.patch_nums) for _ in range(side * side)]
        strength = torch.tensor(scales).unsqueeze(1) * 3.0 / scales[-1]
        (ours, ours_without), (theirs, theirs_without) = logits.chunk(2), teacher.chunk(2)
        p = ((1 + strength) * theirs - strength * theirs_without).softmax(-1)
        log_q = ((1 + strength) * ours - strength * ours_without).log_softmax(-1)
        guided = (p * (p.log() - log_q)).sum(-1).mean()
        output = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
        module.train()
        for seed in range(3):
            torch.manual_seed(seed)
            losses = module(labels, inputs, tokens)
            torch.testing.assert_close(losses["guided"], guided)
            torch.testing.assert_close(losses["output"], output)
            torch.testing.assert_close(losses["cls"], F.cross_entropy(ours.transpose(1, 2), tokens))
            torch.testing.assert_close(losses["loss"], guided + output)


def test_unknown_parts_of_the_loss_are_refused():
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(num_experts=8))
    message = r"losses: expected some of \('cls', 'block', 'output', 'guided'\), got \('kl',\)"
    with pytest.raises(ValueError, match=message):
        Stage2(var, ("kl",))


@pytest.mark.parametrize("shared_aln", [False, True])
def test_attention_ffn_and_head_are_trained_and_nothing_else(shared_aln):
    module = student(shared_aln=shared_aln)
    module(*batch(module.var))["loss"].backward()
    with_gradient = {name for name, p in module.var.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(VARFamily().finetuned_names(module.var))


def test_gradients_of_the_whole_loss_are_right():
    """The slope along the gradient, by central differences; logits and losses are float32 in any model."""
    module = student()
    module.var.double()
    arguments = batch(module.var)
    arguments = (arguments[0], arguments[1].double(), arguments[2])

    def loss():
        return module(*arguments)["loss"]

    weights = tuned_parameters(module.var)
    names = ["blocks.0.attn.mat_qkv.weight", "blocks.0.ffn.fc1.weight", "blocks.1.ffn.fc2.weight", "head.bias"]
    gradients = torch.autograd.grad(loss(), [weights[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        direction = gradient / gradient.norm()
        with torch.no_grad():
            values = []
            for step in (2e-3, -2e-3):
                weights[name].add_(direction, alpha=step)
                values.append(loss().item())
                weights[name].sub_(direction, alpha=step)
        assert gradient.norm().item() == pytest.approx((values[0] - values[1]) / 4e-3, rel=1e-2), name


def test_training_leaves_the_original_and_the_gates_as_they_were():
    module, dense = student(), make_tiny_var()
    gates = {name: p.clone() for name, p in gate_parameters(module.var).items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for _ in range(8):
        losses = module(*batch(module.var))
        distance = losses["block"] + losses["output"]
        history.append(distance.item())
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    assert history[-1] < 0.7 * history[0]
    assert all(torch.equal(p, gates[name]) for name, p in gate_parameters(module.var).items())
    remove_patch(module.var)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(module.var.state_dict()[name], tensor), name


def test_teacher_and_student_drop_the_same_labels():
    module = student().train()
    module.var.cond_drop_rate = 0.5
    seen = []
    handle = module.var.class_emb.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].clone()))
    torch.manual_seed(1)
    labels = torch.arange(10).repeat(2)
    module(labels, torch.zeros(20, module.var.L - 1, 8), torch.zeros(20, module.var.L, dtype=torch.int64))
    handle.remove()
    teacher, ours = seen
    assert torch.equal(teacher, ours)
    assert 0 < (ours == 10).sum() < 20


def test_stage_two_goes_on_from_changed_weights():
    module = student()
    weights = tuned_parameters(module.var)
    with torch.no_grad():
        weights["head.weight"].mul_(2)
    again = Stage2(module.var)
    assert tuned_parameters(again.var)["head.weight"] is weights["head.weight"]
    assert torch.equal(remove_patch(again.var).head.weight * 2, weights["head.weight"])


def test_autocast_trains_as_float32_does_to_rounding():
    module = student()
    exact = module(*batch(module.var))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(*batch(module.var))
    assert all(value.dtype == torch.float32 for value in rounded.values())
    torch.testing.assert_close(rounded["loss"], exact["loss"], atol=0.02, rtol=0.02)
    rounded["loss"].backward()
    assert all(p.grad.isfinite().all() for p in tuned_parameters(module.var).values())


def _train(folder, steps=1) -> None:
    module = student()
    labels, inputs, tokens = batch(module.var)
    plan = Plan("stage2", folder, steps, batch=BATCH, lr=1e-3, warmup=1, bf16=False, clip=1e9)
    module.var.cond_drop_rate = 0.0
    gradients = {}

    def keep(_step):
        for name, p in tuned_parameters(module.var).items():
            gradients[name] = p.grad.clone()

    fit(module, lambda m, i: m(labels[i], inputs[i], tokens[i]), plan, BATCH, after_step=keep)
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
    assert one.keys() == set(VARFamily().finetuned_names(make_tiny_var()))
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_conditional_rows_alone_learn_the_guided_logits_of_the_teacher():
    var = make_tiny_var()
    labels, inputs, tokens = batch(var)
    maps = torch.cat((labels, torch.full_like(labels, var.num_classes)))
    with torch.no_grad():
        teacher = var(maps, torch.cat((inputs, inputs)))
    apply_patch(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-2, weights_from=-2))
    stage = Stage2(var, ("guided",), cfg=3.0).train()
    losses = stage(labels, inputs, tokens)
    first = var.actvar.schedule[-2].start
    strength = torch.tensor([2.0] * 9 + [3.0] * 25).unsqueeze(1)
    expected = (1 + strength) * teacher[:BATCH, first:] - strength * teacher[BATCH:, first:]
    found = teacher[:BATCH, first:]
    assert losses["loss"].item() == pytest.approx(output_loss(found, expected).item(), rel=1e-4)
    losses["loss"].backward()
    grads = {name: parameter.grad for name, parameter in tuned_parameters(var).items()}
    assert all(grad is not None and grad.any() for name, grad in grads.items() if name.endswith("weight"))
    optimizer = torch.optim.AdamW(tuned_parameters(var).values(), lr=3e-3)
    for _ in range(10):
        loss = stage(labels, inputs, tokens)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * losses["loss"]


def test_other_losses_are_refused_where_weights_begin_at_a_later_scale():
    apply_patch(var := make_tiny_var(), ActVARConfig(token_rates=(1, 1), ffn_rate=1, weights_from=-1))
    with pytest.raises(ValueError, match="losses: expected 'guided' alone"):
        Stage2(var)
