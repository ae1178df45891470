"""The evaluation of the bundled model: its feature network, real images, and token maps of test images."""

from __future__ import annotations

from pathlib import Path

import torch

from actvar.evaluate.lite0 import load_lite0
from actvar.evaluate.lite0_quality import Lite0Quality
from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import ImageQuality, cache_folder, image_key, real_images
from actvar.evaluate.texts import Judge
from actvar.families.conditions import Batch
from actvar.models import VAR, VQVAE
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.pretrained import load_feature_network

TEST_IMAGES, BATCH = 200, 100


def text_judges(data: Path, lite0: Lite0Quality | None, device: str | torch.device = "cpu") -> list[tuple[str, Judge]]:
    """Return the comparisons of garments that were drawn of texts with the 60,000 training images.

    Args:
        data: folder with the files of Fashion-MNIST.
        lite0: as `training_lite0_quality` returns it; None leaves that comparison out.
        device: where features are computed.
    """
    quality = training_image_quality(data, device)
    judges: list[tuple[str, Judge]] = [(image_key(quality.network, quality.real.manifold), _of_grey(quality.of))]
    return judges if lite0 is None else [*judges, (lite0.key, _of_grey(lite0.fid_of))]


def _of_grey(judge: Judge) -> Judge:
    """Return a judge of images with three channels, which are nearly equal, that asks `judge` about their mean."""
    return lambda images: judge(images.mean(dim=1, keepdim=True))


def training_image_quality(data: Path, device: str | torch.device = "cpu") -> ImageQuality:
    """Return the comparison with the 60,000 training images, whose statistics `cache_folder()` keeps.

    Args:
        data: folder with the files of Fashion-MNIST.
        device: where features are computed.
    """
    network = load_feature_network().to(device)
    return ImageQuality(network, real_images(network, load_split(data, "train")[0], cache_folder()))


def training_lite0_quality(data: Path, device: str | torch.device = "cpu") -> Lite0Quality:
    """Return the comparison by Lite0 with the 60,000 training images, whose statistics `cache_folder()` keeps.

    Args:
        data: folder with the files of Fashion-MNIST.
        device: where features are computed.

    Raises:
        ModuleNotFoundError, ValueError: see `load_lite0`.
    """
    return Lite0Quality(load_lite0().to(device), load_split(data, "train")[0], cache_folder())


def dense_predictions(vae: VQVAE, var: VAR, data: Path, cfg: float) -> DensePredictions:
    """Return the predictions of an unpatched model on `batches_of_test_images`.

    Args:
        vae: the autoencoder.
        var: the dense model.
        data: folder with the files of Fashion-MNIST.
        cfg: guidance strength.
    """
    return DensePredictions(var, batches_of_test_images(vae, data), cfg)


def batches_of_test_images(vae: VQVAE, data: Path) -> list[Batch]:
    """Return labels and inputs of the first test images in `data`, on the device of `vae`."""
    images, labels = (tensor[:TEST_IMAGES] for tensor in load_split(data, "t10k"))
    device = vae.quantize.embedding.weight.device
    return [
        (batch_labels.to(device), vae.quantize.teacher_input(vae.img_to_idxBl(batch.to(device) * 2 - 1)))
        for batch, batch_labels in zip(images.split(BATCH), labels.split(BATCH), strict=True)
    ]
