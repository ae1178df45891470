"""Muon against torch's, which computes in bfloat16."""

import pytest
import torch

from actvar.training.muon import Muon, orthogonalized

SHAPES = ((48, 16), (16, 16), (16, 48))


def with_gradients(values, gradients):
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def values(generator):
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_it_takes_the_steps_of_torchs_but_for_the_rounding_of_bfloat16(values, generator):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = with_gradients(values, gradients), with_gradients(values, gradients)
    optimizers = (
        Muon(ours, 1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for before, mine, reference in zip(values, ours, theirs, strict=True):
        moved = (reference - before).norm()
        assert moved > 0
        assert (mine - reference).norm() < 0.03 * moved


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_keeps_the_directions_and_evens_the_sizes(shape, generator):
    rank = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)).Q
    found = orthogonalized(u @ torch.diag(torch.linspace(0.5, 1, rank, dtype=torch.float64)) @ v.T)
    assert found.dtype == torch.float64
    sizes = u.T @ found @ v
    assert sizes.diagonal().min() > 0.6
    assert sizes.diagonal().max() < 1.25
    assert (sizes - sizes.diagonal().diag()).abs().max() < 0.05


def test_a_resumed_run_goes_on_where_it_was(values, generator):
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    through, first = with_gradients(values, gradients), with_gradients(values, gradients)
    optimizer = Muon(through, 1e-2, 0.1)
    optimizer.step()
    optimizer.step()
    before = Muon(first, 1e-2, 0.1)
    before.step()
    second = with_gradients([p.detach() for p in first], gradients)
    after = Muon(second, 1e-2, 0.1)
    after.load_state_dict(before.state_dict())
    after.step()
    for a, b in zip(through, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"expected matrices, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], 1e-3, 0.1)
