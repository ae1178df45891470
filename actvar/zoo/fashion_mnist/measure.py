"""Measure the shipped files: classifier accuracy, reconstruction and generation quality, class agreement."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from actvar.evaluate.quality import FrechetDistance, sample_classes
from actvar.files import replacing
from actvar.models import VQVAE
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.fashion_mnist.features import FeatureNet
from actvar.zoo.pretrained import load_feature_network, load_pretrained

IMAGE_SHAPE = (1, 32, 32)
BATCH = 500


def measure(data: Path, samples: int = 5000) -> dict[str, object]:
    """Every figure of the model card, from the shipped files and the images alone.

    Args:
        data: folder of the idx files.
        samples: images drawn from the dense model and again with the adapter (guidance 1.5, classes in turn).

    Returns:
        the CNN's test accuracy; FID of the training images against the test images; reconstruction FID of the test
        images; and per model its FID against the training images and how often the CNN sees the wanted class.
    """
    network = load_feature_network()
    train, test = load_split(data, "train")[0].split(BATCH), load_split(data, "t10k")[0].split(BATCH)
    to_train = FrechetDistance(network, train, IMAGE_SHAPE)
    vae, var = load_pretrained("fashion-mnist")
    figures: dict[str, object] = {
        "test_accuracy": _accuracy(network, torch.cat(test), load_split(data, "t10k")[1]),
        "fid_train_against_test": to_train.to(test),
        "rfid_test": FrechetDistance(network, test, IMAGE_SHAPE).to(_reconstructed(vae, test)),
    }
    adapted = {name: load_pretrained("fashion-mnist", adapter=name)[1] for name in ("paper", "best")}
    for name, model in {"dense": var, **adapted}.items():
        figures[name] = generated_quality(model, network, to_train, samples)
    return figures


def generated_quality(
    var: nn.Module, network: FeatureNet, to_train: FrechetDistance, samples: int
) -> dict[str, float | list[float]]:
    """`fid` and `agreement` of `samples` images of `var`, and the agreement per class."""
    batches = list(sample_classes(var, samples, batch=100, num_classes=10))
    labels = torch.cat([labels for _, labels in batches])
    correct = _predictions(network, [images for images, _ in batches]) == labels
    return {
        "fid": to_train.to(images for images, _ in batches),
        "agreement": correct.float().mean().item(),
        "agreement_by_class": [correct[labels == c].float().mean().item() for c in range(10)],
    }


def _accuracy(network: FeatureNet, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (_predictions(network, images.split(BATCH)) == labels).float().mean().item()


@torch.no_grad()
def _predictions(network: FeatureNet, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([network.logits(batch).argmax(1) for batch in batches])


def _reconstructed(vae: VQVAE, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield vae.idxBl_to_img(vae.img_to_idxBl(batch * 2 - 1)) * 0.5 + 0.5


def save(figures: dict[str, object], path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
