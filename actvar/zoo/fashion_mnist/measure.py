"""Measure the shipped files: classifier accuracy, reconstruction and generation quality, class agreement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from actvar.evaluate.quality import frechet_distance, sample_classes
from actvar.models import VQVAE
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.pretrained import load_feature_network, load_pretrained

IMAGE_SHAPE = (1, 32, 32)
BATCH = 500


@dataclass(frozen=True)
class Generated:
    """FID of samples against the training images, and the share of samples the CNN puts into the wanted class."""

    fid: float
    agreement: float
    agreement_by_class: list[float]


def measure(data: Path, samples: int = 5000) -> dict[str, object]:
    """Every figure of the model card, from the shipped files and the images alone.

    Args:
        data: folder of the idx files.
        samples: images drawn from the dense model and again with the adapter (guidance 1.5).
    """
    network = load_feature_network()
    train, _ = load_split(data, "train")
    test, labels = load_split(data, "t10k")
    vae, var = load_pretrained("fashion-mnist")
    figures: dict[str, object] = {
        "test_accuracy": _accuracy(network, test, labels),
        "fid_train_against_test": frechet_distance(network, train.split(BATCH), test.split(BATCH), IMAGE_SHAPE),
        "rfid_test": frechet_distance(network, test.split(BATCH), _reconstructed(vae, test), IMAGE_SHAPE),
    }
    for name, model in {"dense": var, "paper": load_pretrained("fashion-mnist", adapter="paper")[1]}.items():
        result = generated_quality(model, network, train, samples)
        figures[name] = result.__dict__
    return figures


def generated_quality(var: nn.Module, network: nn.Module, train: torch.Tensor, samples: int) -> Generated:
    """FID and class agreement of `samples` images of `var`, classes in turn."""
    batches = list(sample_classes(var, samples, batch=100, num_classes=10))
    fid = frechet_distance(network, train.split(BATCH), (images for images, _ in batches), IMAGE_SHAPE)
    labels = torch.cat([labels for _, labels in batches])
    with torch.no_grad():
        correct = torch.cat([network.logits(images).argmax(1) for images, _ in batches]) == labels
    by_class = [correct[labels == c].float().mean().item() for c in range(10)]
    return Generated(fid, correct.float().mean().item(), by_class)


@torch.no_grad()
def _accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    predicted = torch.cat([network.logits(batch).argmax(1) for batch in images.split(BATCH)])
    return (predicted == labels).float().mean().item()


def _reconstructed(vae: VQVAE, images: torch.Tensor):
    for batch in images.split(BATCH):
        yield vae.idxBl_to_img(vae.img_to_idxBl(batch * 2 - 1)) * 0.5 + 0.5


def save(figures: dict[str, object], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=2) + "\n")
