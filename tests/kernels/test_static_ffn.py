"""Static units: the FFN of the first experts, in every backend, and packed copies that follow the weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from actvar_kernels import expert_ffn, static_ffn
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import brgemm, packing
from actvar_kernels.cpu_backend.packing import drop_changed
from actvar_kernels.expert_ffn import reference
from actvar_kernels.expert_ffn.weights import FFNWeights

EXPERTS, C, D = 8, 24, 96
needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")


def weights_of(dtype=torch.float32) -> FFNWeights:
    generator = torch.Generator().manual_seed(0)
    shapes = (D, C), (D,), (C, D), (C,)
    return FFNWeights(*(torch.nn.Parameter(0.3 * torch.randn(s, generator=generator).to(dtype)) for s in shapes))


def rows(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, C, generator=torch.Generator().manual_seed(1)).to(dtype)


def first_on(active: int) -> torch.Tensor:
    return (torch.arange(EXPERTS) < active).expand(2, 5, EXPERTS)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [1, 5, EXPERTS])
def test_the_result_is_that_of_experts_of_which_the_first_are_on(active, dtype, backend):
    weights, u = weights_of(dtype), rows(dtype)
    due = reference.expert_ffn(u, first_on(active), *weights)
    with using_backend(backend):
        found = static_ffn(u, active, EXPERTS, *weights)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, due, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_all_experts_are_the_dense_ffn():
    weights, u = weights_of(), rows()
    torch.testing.assert_close(
        static_ffn(u, EXPERTS, EXPERTS, *weights), expert_ffn(u, first_on(EXPERTS), EXPERTS, *weights)
    )


@needs_bytes
@torch.no_grad()
@pytest.mark.parametrize("active", [3, EXPERTS])
def test_in_eight_bits_layers_have_the_units_that_are_on_alone(active):
    weights, u = weights_of(), rows()
    units = FFNWeights(*(part.clone() for part in weights.first(active * D // EXPERTS)))
    found = static_ffn(u, active, EXPERTS, *weights, quantized=torch.int8)
    assert torch.equal(found, expert_ffn(u, first_on(active)[..., :active], active, *units, quantized=torch.int8))
    with using_backend("reference"):
        due = static_ffn(u, active, EXPERTS, *weights, quantized=torch.int8)
    assert torch.equal(due, reference.quantized_expert_ffn(u, first_on(active)[..., :active], *units, torch.int8))
    assert (found - due).abs().max() <= 0.02 * due.abs().max()  # now and then another byte of a hidden unit


def test_gradients_reach_the_units_that_are_on_alone():
    weights, u = weights_of(), rows().requires_grad_(True)
    static_ffn(u, 3, EXPERTS, *weights).square().sum().backward()
    units = 3 * D // EXPERTS
    assert weights.fc1_weight.grad[:units].abs().sum() > 0
    assert not weights.fc1_weight.grad[units:].any()
    assert not weights.fc2_weight.grad[:, units:].any()
    assert u.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "data"])
def test_packed_units_follow_their_weights(change):
    weights, u = weights_of(), rows()
    static_ffn(u, 3, EXPERTS, *weights)
    if change == "data":
        weights.fc2_weight.data.mul_(2)
        drop_changed([weights.fc1_weight])  # as a sample begins
    else:
        weights.fc2_weight.mul_(2)
    due = reference.expert_ffn(u, first_on(3), *weights)
    torch.testing.assert_close(static_ffn(u, 3, EXPERTS, *weights), due, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_units_are_kept_and_go_with_their_weights(monkeypatch):
    weights, u = weights_of(), rows()
    static_ffn(u, 3, EXPERTS, *weights)
    before = len(packing._cache)
    static_ffn(u, 3, EXPERTS, *weights)
    assert len(packing._cache) == before
    alive = [weakref.ref(tensor) for tensor in weights]
    del weights
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert len(packing._cache) < before or before == 0


@pytest.mark.parametrize(
    ("active", "experts", "message"),
    [(0, EXPERTS, "active: expected"), (9, EXPERTS, "active: expected"), (1, 7, "num_experts: expected a divisor")],
)
def test_counts_that_do_not_fit_are_refused(active, experts, message):
    with pytest.raises(ValueError, match=message):
        static_ffn(rows(), active, experts, *weights_of())
