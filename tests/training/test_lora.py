"""Stage 2 by low-rank changes: what is trained, with which gradients, and that the file gives the trained model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import make_tiny_var, sample

from actvar import ActVARConfig, apply_patch, load_adapter, remove_patch, save_adapter
from actvar.cli import main
from actvar.distill import Stage2
from actvar.distill.recipes import LORA_LR, RECIPES
from actvar.distill.run import Distillation
from actvar.families.var import VARFamily
from actvar.patching.adapter import describe_adapter, gate_parameters
from actvar.training.loop import fit
from actvar.training.plan import Plan
from actvar.training.processes import run_in_processes
from actvar.utils.low_rank import merged
from actvar.utils.weight_override import own_parameters, tuned_factors, tuned_parameters

CONFIG = ActVARConfig(num_experts=8)
LATE = ActVARConfig(token_rates=(1, 1), ffn_rate=1, guidance_until=-2, weights_from=-2, num_experts=8)
BATCH, RANK = 4, 3


def batch(var):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, var.L - 1, 8, generator=generator)
    return torch.tensor([0, 4, 9, 2]), inputs, torch.randint(64, (BATCH, var.L), generator=generator)


def student(config=CONFIG, losses=("cls", "block", "output"), trained=True, **changes):
    """Return stage 2 with factors, which change the model if it is `trained`."""
    module = Stage2(apply_patch(make_tiny_var(**changes), config), losses, lora=RANK)
    if trained:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for factor in module.low_rank.B:
                factor.normal_(0, 0.1, generator=generator)
    return module


@pytest.mark.parametrize("shared_aln", [False, True])
def test_factors_of_all_matrices_are_trained_and_nothing_else(shared_aln):
    module = student(shared_aln=shared_aln)
    module(*batch(module.var))["loss"].backward()
    with_gradient = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    names = VARFamily().finetuned_names(module.var)
    matrices = [name for name in names if own_parameters(module.var).get(name) is not None]
    assert set(module.low_rank.names) == {n for n in names if module.var.get_parameter(n).ndim == 2} == set(matrices)
    assert with_gradient == {f"low_rank.{side}.{index}" for side in "AB" for index in range(len(matrices))}
    assert {n for n, p in module.named_parameters() if p.requires_grad} == with_gradient


def test_new_factors_leave_the_model_as_it_is():
    module, whole = student(trained=False), Stage2(apply_patch(make_tiny_var(), CONFIG))
    ours, theirs = (stage(*batch(stage.var)) for stage in (module, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = student(trained=False)
    assert all(torch.equal(a, b) for a, b in zip(module.low_rank.A, again.low_rank.A, strict=True))
    assert not any(factor.any() for factor in module.low_rank.B)


@pytest.mark.parametrize(
    ("config", "losses"),
    [(CONFIG, ("cls", "block", "output")), (CONFIG, ("output", "guided")), (LATE, ("guided",))],
    ids=["paper", "guided", "guidance until"],
)
def test_gradients_follow_from_those_of_whole_weights(config, losses):
    """`dL/dA = B^T dL/dW` and `dL/dB = dL/dW A^T`, with dL/dW of whole weights that have the same values."""
    module = student(config, losses)
    whole = Stage2(apply_patch(make_tiny_var(), config), losses)
    with torch.no_grad():
        for name, weight in module.low_rank.weights(module.var).items():
            tuned_parameters(whole.var)[name].copy_(weight)
    found, due = (stage(*batch(stage.var)) for stage in (module, whole))
    assert all(torch.equal(found[name], due[name]) for name in due)
    found["loss"].backward()
    due["loss"].backward()
    for name, (A, B) in module.low_rank.factors().items():
        gradient = tuned_parameters(whole.var)[name].grad
        torch.testing.assert_close(A.grad, B.T @ gradient, atol=1e-7, rtol=1e-4, msg=name)
        torch.testing.assert_close(B.grad, gradient @ A.T, atol=1e-7, rtol=1e-4, msg=name)


def test_early_scales_keep_the_models_own_weights():
    module = student(LATE, ("guided",))
    labels, inputs, _ = batch(module.var)
    first = module.var.actvar.schedule[-2].start
    with torch.no_grad():
        found, dense = module._student(labels, inputs), make_tiny_var()(labels, inputs)
    torch.testing.assert_close(found[:, :first], dense[:, :first], atol=1e-5, rtol=0)
    assert (found - dense)[:, first:].abs().max() > 1e-2


def trained(steps=8, **settings):
    module = student(trained=False, **settings)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(steps):
        loss = module(*batch(module.var))["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module, history


def with_orders(path):
    """Write an adapter with an order of the hidden units."""
    var, generator = apply_patch(make_tiny_var(), CONFIG), torch.Generator().manual_seed(1)
    for block in var.blocks:
        block.actvar.hidden_order.copy_(torch.randperm(512, generator=generator))
    save_adapter(var, path)
    return path


@pytest.mark.parametrize("ordered", [False, True], ids=["original order", "order of clustered experts"])
def test_the_file_gives_the_trained_model_bit_for_bit(tmp_path, ordered):
    dense = make_tiny_var()
    var = make_tiny_var()
    if ordered:
        load_adapter(var, with_orders(tmp_path / "order.safetensors"))
    else:
        apply_patch(var, CONFIG)
    gates = {name: gate.clone() for name, gate in gate_parameters(var).items()}
    module = Stage2(var, ("output",), lora=RANK)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(8):
        loss = module(*batch(var))["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[-1] < 0.7 * history[0]
    with torch.no_grad():
        losses = module.eval()(*batch(var))
    module.finish()
    save_adapter(var, tmp_path / "lora.safetensors")
    other = load_adapter(make_tiny_var(), tmp_path / "lora.safetensors")
    assert torch.equal(sample(other), sample(var))
    assert all(torch.equal(gate, gates[name]) for name, gate in gate_parameters(other).items())
    with torch.no_grad():
        again = Stage2(other, ("output",), lora=RANK).eval()(*batch(other))
    assert all(torch.equal(again[name], losses[name]) for name in losses)
    for model in (var, other):
        remove_patch(model)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
        assert torch.equal(sample(model), sample(dense))


def test_the_sum_is_computed_in_float32_under_autocast():
    module = student()
    expected = module.low_rank.weights(module.var)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.low_rank.weights(module.var)
        loss = module(*batch(module.var))["loss"]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    torch.testing.assert_close(loss, module(*batch(module.var))["loss"], atol=0.02, rtol=0.02)
    loss.backward()
    assert all(factor.grad.isfinite().all() for factor in module.low_rank.parameters())


def test_stage_two_goes_on_from_factors():
    module, _ = trained()
    with torch.no_grad():
        losses = module.eval()(*batch(module.var))
    module.finish()
    factors = tuned_factors(module.var)
    again = Stage2(module.var, lora=RANK).eval()
    with torch.no_grad():
        assert torch.equal(again(*batch(again.var))["loss"], losses["loss"])
    assert all(
        torch.equal(A, factors[n].A) and torch.equal(B, factors[n].B) for n, (A, B) in again.low_rank.factors().items()
    )
    with torch.no_grad():
        next(iter(again.low_rank.B)).add_(1)
    assert tuned_factors(module.var) is not factors
    again.finish()
    name = again.low_rank.names[0]
    assert torch.equal(tuned_factors(again.var)[name].B, factors[name].B + 1)
    assert torch.equal(
        tuned_parameters(again.var)[name], merged(own_parameters(again.var)[name], tuned_factors(again.var)[name])
    )


def test_whole_weights_are_trained_on_from_factors_and_saved_whole(tmp_path):
    module, _ = trained()
    with torch.no_grad():
        losses = module.eval()(*batch(module.var))
    module.finish()
    whole = Stage2(module.var).eval()
    assert torch.equal(whole(*batch(whole.var))["loss"], losses["loss"])
    save_adapter(whole.var, tmp_path / "whole.safetensors")
    names = {f"weights.{name}" for name in VARFamily().finetuned_names(whole.var)}
    assert load_file(tmp_path / "whole.safetensors").keys() - gate_parameters(whole.var).keys() == names


def test_what_takes_no_factors_is_refused():
    var = apply_patch(make_tiny_var(), CONFIG)
    for rank in (0, -1, 65):
        with pytest.raises(ValueError, match="lora: expected an integer from 1 to 64"):
            Stage2(var, lora=rank)
    with pytest.raises(TypeError, match="lora: expected an integer"):
        Stage2(var, lora=2.5)
    assert not tuned_parameters(var)
    module = Stage2(var, lora=2)
    module.finish()
    with pytest.raises(ValueError, match=r"lora: expected the rank of the adapter .* got rank 4 for .* rank 2"):
        Stage2(var, lora=4)
    Stage2(apply_patch(var, CONFIG))
    with pytest.raises(ValueError, match="lora: expected an adapter that changes no whole weights"):
        Stage2(var, lora=2)
    with pytest.raises(ValueError, match="lora: expected None with stage 1"):
        Distillation(1, lora=4)


def test_activation_checkpointing_is_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    var = apply_patch(make_tiny_var(), CONFIG)
    var.blocks[1] = checkpoint_wrapper(var.blocks[1])
    with pytest.raises(ValueError, match="lora: expected blocks without activation checkpointing"):
        Stage2(var, lora=2)
    names = tuned_parameters(Stage2(var).var).keys()
    assert names == set(VARFamily().finetuned_names(make_tiny_var()))


def _train(folder) -> None:
    module = student()
    labels, inputs, tokens = batch(module.var)
    plan = Plan("stage2", folder, 1, batch=BATCH, lr=1e-3, warmup=1, bf16=False, clip=1e9)
    module.var.cond_drop_rate = 0.0
    gradients = {}

    def keep(_step):
        gradients.update({name: p.grad.clone() for name, p in module.low_rank.named_parameters()})

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
    assert len(one) == 2 * 9
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a tiny model, and gates for it."""
    folder = tmp_path_factory.mktemp("model")
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    save_adapter(apply_patch(var, CONFIG), folder / "gates.safetensors")
    return folder


def distilled(files, out, **changes):
    options = {"stage": 2, "data": "none", "samples": 32, "batch": 16, "epochs": 1, "lr": 1e-2, "lora": RANK}
    options |= {"adapter": files / "gates.safetensors"} | changes
    given = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    main(["distill", "--var", str(files / "var.pth"), "--vae", str(files / "vae.pth"), "--out", str(out), *given])
    return load_file(out)


@pytest.mark.parametrize("recipe", ["paper", "best", "guided"])
def test_the_command_writes_factors_and_says_so(files, tmp_path, recipe):
    out, again = tmp_path / "lora.safetensors", tmp_path / "again.safetensors"
    tensors = distilled(files, out, recipe=recipe)
    facts = describe_adapter(out)
    assert facts["rank"] == facts["training"]["lora"] == RANK
    assert {name.split(".")[0] for name in tensors} == {"blocks", "factors"}
    assert all(factor.any() for name, factor in tensors.items() if name.startswith("factors."))
    further = distilled(files, again, adapter=out, recipe="guided")
    name = "factors.head.weight.B"
    assert not torch.equal(further[name], tensors[name])


def test_the_command_ends_guidance(files, tmp_path):
    out = tmp_path / "lora.safetensors"
    options = {"guidance-until": -2}
    distilled(files, out, recipe="guided", **options)
    var = load_adapter(make_tiny_var(), out)
    assert (var.actvar.config.guidance_until, var.actvar.config.weights_from) == (-2, -2)
    again = distilled(files, tmp_path / "again.safetensors", adapter=out, recipe="guided", **options)
    assert "factors.head.weight.A" in again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 1}, "--lora: expected None with stage 1"),
        ({"lora": 0}, "--lora: expected"),
        ({"lora": 65}, "--lora: expected an integer from 1 to 64"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(files, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        distilled(files, tmp_path / "a.safetensors", **changes)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_factors_are_trained_by_adamw_at_a_rate_of_their_own(tmp_path):
    for name, recipe in RECIPES.items():
        plan = Distillation(2, recipe, lora=4, batch=4).plan(16, tmp_path)
        assert (plan.lr, plan.muon) == (LORA_LR, False), name
        assert Distillation(2, recipe, lora=4, batch=4, lr=1e-4).plan(16, tmp_path).lr == 1e-4
    assert Distillation(2, RECIPES["best"], batch=4).plan(16, tmp_path).muon
