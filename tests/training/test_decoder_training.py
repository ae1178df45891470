"""The decoder's training against critics: what is trained, and by which part of the loss."""

from __future__ import annotations

import pytest
import torch

from actvar.zoo.fashion_mnist import architecture
from actvar.zoo.fashion_mnist.features import FeatureNet
from scripts.fashion_mnist.adversarial import AdversarialTraining, frozen
from scripts.fashion_mnist.train import split_scales

B = 4


@pytest.fixture(scope="module")
def training() -> AdversarialTraining:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, _ = architecture.build(0)
        return AdversarialTraining(vae, FeatureNet().eval()).train()


@pytest.fixture(scope="module")
def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    maps = [split_scales(torch.randint(512, (B, 130), generator=generator)) for _ in range(2)]
    images = [torch.rand(B, 1, 32, 32, generator=generator) for _ in range(2)]
    labels = [torch.randint(10, (B,), generator=generator) for _ in range(3)]
    return maps[0], images[0], labels[0], maps[1], labels[1], images[1], labels[2]


def gradients(training: AdversarialTraining, loss: torch.Tensor) -> dict[str, float]:
    training.zero_grad()
    loss.backward()
    return {name: p.grad.norm().item() for name, p in training.named_parameters() if p.grad is not None}


def test_decoder_and_critics_are_trained_and_nothing_else(training, batch):
    found = gradients(training, training(*batch)["loss"])
    prefixes = ("reconstruction.vae.decoder.", "reconstruction.vae.post_quant_conv.", "critics.")
    assert found.keys() == {name for name, p in training.named_parameters() if p.requires_grad}
    assert all(name.startswith(prefixes) for name in found)
    assert all(any(name.startswith(prefix) and norm > 0 for name, norm in found.items()) for prefix in prefixes)


def test_each_side_of_the_game_has_its_own_loss(training, batch):
    of_critics = gradients(training, training(*batch)["critics"])
    assert of_critics
    assert all(name.startswith("critics.") for name in of_critics)
    of_decoder = gradients(training, training(*batch)["fooled"])
    assert of_decoder
    assert all(name.startswith("reconstruction.vae.") for name in of_decoder)
    assert all(p.requires_grad for p in training.critics.parameters())


def test_a_step_down_the_loss_of_the_critics_tells_real_from_made(training, batch):
    """The hinge loss of five critics starts near 2 each."""
    optimizer = torch.optim.Adam(training.critics.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = training(*batch)["critics"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 9 < losses[0] < 11
    assert losses[-1] < losses[0] - 0.5


def test_before_training_drawn_maps_are_decoded_as_before(training, batch):
    assert training(*batch)["moved"] < 1e-6


def test_parameters_are_trainable_again_after_an_error(training):
    def fail() -> None:
        with frozen(training.critics):
            assert not any(p.requires_grad for p in training.critics.parameters())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert all(p.requires_grad for p in training.critics.parameters())
