"""What the bundled model is evaluated with: its feature network, real images, and token maps of test images."""

from __future__ import annotations

from pathlib import Path

from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import ImageQuality, cache_folder, real_images
from actvar.models import VAR, VQVAE
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.pretrained import load_feature_network

TEST_IMAGES, BATCH = 200, 100


def training_image_quality(data: Path) -> ImageQuality:
    """Compares with the 60,000 training images in `data`, whose statistics are kept in `cache_folder()`."""
    network = load_feature_network()
    return ImageQuality(network, real_images(network, load_split(data, "train")[0], cache_folder()))


def dense_predictions(vae: VQVAE, var: VAR, data: Path, cfg: float) -> DensePredictions:
    """Of an unpatched model on the token maps of the first test images."""
    images, labels = (of_split[:TEST_IMAGES] for of_split in load_split(data, "t10k"))
    device = var.head.weight.device
    batches = [
        (of_batch.to(device), vae.quantize.teacher_input(vae.img_to_idxBl(image.to(device) * 2 - 1)))
        for image, of_batch in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    ]
    return DensePredictions(var, batches, cfg)
