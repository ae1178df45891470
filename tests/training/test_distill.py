from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar import ActVARConfig, apply_patch
from actvar.distill import Stage1
from actvar.distill.losses import (
    balance_loss,
    distillation_loss,
    expert_distances,
    router_target,
    selector_target,
)
from actvar.patching.adapter import gate_parameters


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_expert_distances_equal_the_ones_computed_expert_by_expert():
    T, C, D, N = 5, 6, 12, 4
    u, w1, b1, w2, b2 = normal(T, C), normal(D, C, seed=1), normal(D, seed=2), normal(C, D, seed=3), normal(C, seed=4)
    whole = F.gelu(u @ w1.T + b1, approximate="tanh") @ w2.T + b2
    expected = torch.empty(T, N, dtype=torch.float64)
    for e in range(N):
        units = slice(e * D // N, (e + 1) * D // N)
        output = F.gelu(u @ w1[units].T + b1[units], approximate="tanh") @ w2[:, units].T + b2
        expected[:, e] = (output - whole).square().mean(dim=1)
    torch.testing.assert_close(expert_distances(u, w1, b1, w2, N), expected)


def test_router_target_is_a_softmax_over_the_nearest_experts():
    target = router_target(torch.tensor([[1.0, 3.0, 2.0, 6.0]]), active=2)
    relative = torch.tensor([1.0, 2.0]) / 3.0
    expected = (-relative).softmax(0)
    torch.testing.assert_close(target, torch.tensor([[expected[0], 0.0, expected[1], 0.0]]))


def test_selector_target_is_a_softmax_over_the_most_changed_tokens():
    target = selector_target(torch.tensor([[2.0, 0.0, 4.0]]), keep=2)
    expected = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(target, torch.tensor([[expected[0], 0.0, expected[1]]]))


def test_distillation_loss_is_zero_at_the_target_and_positive_elsewhere():
    logits = normal(3, 5)
    assert distillation_loss(logits.softmax(-1), logits).item() == pytest.approx(0, abs=1e-12)
    target = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert distillation_loss(target, torch.zeros(1, 2, dtype=torch.float64)).item() == pytest.approx(
        2**0 * 0.6931471805
    )


def test_balance_loss_of_an_even_choice_is_the_number_chosen():
    chosen = torch.eye(4, dtype=torch.bool).repeat(3, 1) | torch.eye(4, dtype=torch.bool).roll(1, 0).repeat(3, 1)
    assert balance_loss(torch.zeros(12, 4), chosen).item() == pytest.approx(2)
    skewed = torch.zeros(12, 4)
    skewed[:, 0] = 5
    always_first = torch.zeros(12, 4, dtype=torch.bool)
    always_first[:, :2] = True
    assert balance_loss(skewed, always_first) > 2


@pytest.mark.parametrize("loss", ["distillation", "balance", "distances"])
def test_gradients_of_the_losses_are_right(loss):
    logits = normal(3, 4).requires_grad_()
    if loss == "distillation":
        assert torch.autograd.gradcheck(lambda x: distillation_loss(normal(3, 4, seed=1).softmax(-1), x), logits)
    elif loss == "balance":
        chosen = normal(3, 4, seed=1) > 0
        assert torch.autograd.gradcheck(lambda x: balance_loss(x, chosen), logits)
    else:
        weights = normal(8, 4, seed=1), normal(8, seed=2), normal(4, 8, seed=3)
        assert torch.autograd.gradcheck(lambda x: expert_distances(x, *weights, 4), logits)


@pytest.fixture
def batch(tiny_var):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, tiny_var.L - 1, 8, generator=generator)
    return torch.tensor([0, 4, 9]), inputs, torch.randint(64, (3, tiny_var.L), generator=generator)


def test_stage_one_trains_the_gates_and_nothing_else(tiny_var, batch):
    module = Stage1(apply_patch(tiny_var, ActVARConfig(num_experts=8)))
    losses = module(*batch)
    losses["loss"].backward()
    with_gradient = {name for name, p in tiny_var.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    gates = {f"blocks.{b}.actvar.{gate}.weight" for b in range(2) for gate in ("selector", "router")}
    biases = {name.replace("weight", "bias") for name in gates}
    assert gates <= with_gradient <= gates | biases
    parts = losses["cls"] + 0.05 * (losses["router"] + losses["selector"]) + 0.01 * losses["balance"]
    torch.testing.assert_close(losses["loss"], parts)


def test_the_straight_through_gates_do_not_change_the_logits(tiny_var, batch):
    apply_patch(tiny_var, ActVARConfig(num_experts=8))
    with torch.no_grad():
        expected = tiny_var(*batch[:2])
    Stage1(tiny_var)
    logits = tiny_var(*batch[:2])
    assert logits.requires_grad
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_classification_loss_reaches_the_gates(tiny_var, batch):
    module = Stage1(apply_patch(tiny_var, ActVARConfig(num_experts=8)))
    module(*batch)["cls"].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in gate_parameters(tiny_var).items() if name.endswith("weight"))


def test_stage_one_lowers_its_distillation_losses(tiny_var, batch):
    module = Stage1(apply_patch(tiny_var, ActVARConfig(num_experts=8)))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(15):
        losses = module(*batch)
        history.append((losses["router"] + losses["selector"]).item())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize(
    "config", [ActVARConfig(token_rates=(1, 1)), ActVARConfig(ffn_rate=1)], ids=["no tokens", "no experts"]
)
def test_stage_one_runs_with_one_kind_of_sparsity(tiny_var, batch, config):
    module = Stage1(apply_patch(tiny_var, config))
    losses = module(*batch)
    losses["loss"].backward()
    assert losses["loss"].isfinite()


def test_stage_one_needs_something_to_train(tiny_var):
    apply_patch(tiny_var, ActVARConfig(token_rates=(1, 1), ffn_rate=1))
    with pytest.raises(ValueError, match="no selector or router to train"):
        Stage1(tiny_var)


def test_each_loss_is_averaged_over_the_scales_where_its_gate_runs(tiny_var, batch):
    """With one scale routed, the router loss is that scale's, not half of it."""
    only_last = Stage1(apply_patch(tiny_var, ActVARConfig(scales=(-1,), token_rates=(1,), num_experts=8)))
    expected = only_last(*batch)["router"]
    both = Stage1(apply_patch(tiny_var, ActVARConfig(token_rates=(1, 1), ffn_rate=(1, 0.75), num_experts=8)))
    torch.testing.assert_close(both(*batch)["router"], expected)


def test_frozen_gates_are_no_straight_through_gates(tiny_var, batch, monkeypatch):
    calls = []
    monkeypatch.setattr("actvar.sparse.teacher_forcing.straight_through", lambda scores: calls.append(scores) or scores)
    apply_patch(tiny_var, ActVARConfig(num_experts=8))
    labels, inputs, _ = batch
    assert tiny_var(labels, inputs.requires_grad_()).requires_grad
    assert calls == []


def test_stage_one_needs_a_patched_model(tiny_var):
    with pytest.raises(ValueError, match=r"patched by actvar.apply_patch"):
        Stage1(tiny_var)
