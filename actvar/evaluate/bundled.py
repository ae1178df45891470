"""What the bundled model is evaluated with: its feature network, real images, and token maps of test images."""

from __future__ import annotations

from pathlib import Path

import torch

from actvar.evaluate.predictions import Batch, DensePredictions
from actvar.evaluate.quality import ImageQuality, cache_folder, real_images
from actvar.models import VAR, VQVAE
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.pretrained import load_feature_network

TEST_IMAGES, BATCH = 200, 100


def training_image_quality(data: Path, device: str | torch.device = "cpu") -> ImageQuality:
    """Compares, on `device`, with the 60,000 training images in `data`, whose statistics `cache_folder()` keeps."""
    network = load_feature_network().to(device)
    return ImageQuality(network, real_images(network, load_split(data, "train")[0], cache_folder()))


def dense_predictions(vae: VQVAE, var: VAR, data: Path, cfg: float) -> DensePredictions:
    """Of an unpatched model on `batches_of_test_images`."""
    return DensePredictions(var, batches_of_test_images(vae, data), cfg)


def batches_of_test_images(vae: VQVAE, data: Path) -> list[Batch]:
    """Labels and token maps of the first test images in `data`, on the device of `vae`."""
    images, labels = (of_split[:TEST_IMAGES] for of_split in load_split(data, "t10k"))
    device = vae.quantize.embedding.weight.device
    return [
        (of_batch.to(device), vae.quantize.teacher_input(vae.img_to_idxBl(image.to(device) * 2 - 1)))
        for image, of_batch in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    ]
