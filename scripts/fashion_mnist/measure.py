"""Measure the shipped files: classifier accuracy, reconstruction and generation quality, class agreement."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from actvar.evaluate.bundled import training_image_quality
from actvar.evaluate.methods import chosen_methods, methods_of
from actvar.evaluate.quality import BATCH, ImageQuality, real_images
from actvar.evaluate.run import Evaluation, sampled_images
from actvar.utils.files import replacing
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.pretrained import bundled_adapters, load_pretrained


@torch.no_grad()
def measure(data: Path, samples: int = 5000) -> dict[str, object]:
    """Every figure of the model card, from the shipped files and the images alone.

    Args:
        data: folder of the idx files.
        samples: images drawn from the dense model and again with each adapter (guidance 1.5, classes in turn), as
            `actvar evaluate` draws them.

    Returns:
        the CNN's test accuracy; FID of the training images against the test images; reconstruction FID of the test
        images; and per model what `ImageQuality` finds against the training images, with the share of images of every
        class that the CNN puts there.
    """
    to_train = training_image_quality(data)
    network = to_train.network
    test, classes = load_split(data, "t10k")
    vae, var = load_pretrained("fashion-mnist")
    to_test = ImageQuality(network, real_images(network, test))
    reconstructed = torch.cat([vae.idxBl_to_img(vae.img_to_idxBl(b * 2 - 1)) * 0.5 + 0.5 for b in test.split(BATCH)])
    against_train = to_train.of(test, classes)
    figures: dict[str, object] = {
        "test_accuracy": against_train["agreement"],
        "fid_train_against_test": against_train["fid"],
        "rfid_test": to_test.of(reconstructed)["fid"],
    }
    names = ("dense", *bundled_adapters("fashion-mnist"))
    for method in chosen_methods(",".join(names), methods_of("fashion-mnist")):
        with method.applied(var), tempfile.TemporaryDirectory() as folder:
            images, labels = sampled_images(var, Evaluation(num=samples).bulk(var, seed=0), Path(folder))
        right = torch.cat([network.logits(batch).argmax(dim=1) for batch in images.split(BATCH)]) == labels
        by_class = [right[labels == label].float().mean().item() for label in range(var.num_classes)]
        figures[method.name] = to_train.of(images, labels) | {"agreement_by_class": by_class}
    return figures


def save(figures: dict[str, object], path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
