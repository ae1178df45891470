"""Measure FID by EfficientNet-Lite0, and how far images are from the dense model's in its features."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from actvar.evaluate.lite0 import Lite0
from actvar.evaluate.quality import BATCH, Moments, image_key, kept, moments, network_features
from actvar.utils.progress import progress

LITE0_BATCH = 25
"""Images at a time, few enough that memory is used again rather than asked of the system anew."""


@dataclass(frozen=True)
class DenseFeatures:
    """Hold the features of the dense model's images of one seed.

    Args:
        features: `[N, F]` float32.
        unit: mean Euclidean distance between the features of two images of one class.
    """

    features: torch.Tensor
    unit: float


class Lite0Quality:
    """Compare images with real ones and with the dense model's; features are computed on the network's device.

    Args:
        network: in eval mode.
        real: real images, `[N, C, H, W]` float32 in [0, 1].
        cache: folder that keeps the statistics of real images; None: nothing is kept.
    """

    def __init__(self, network: Lite0, real: torch.Tensor, cache: Path | None = None):
        self.network, self.key = network, image_key(network, real)
        statistics_of_real = kept(Moments, cache, self.key, lambda: moments(network.num_features, self._batches(real)))
        self.frechet = statistics_of_real.frechet()

    def dense_features(self, images: torch.Tensor, labels: torch.Tensor) -> DenseFeatures:
        """Return the features of the dense model's images, to compare others with.

        Args:
            images: `[N, C, H, W]` float32 in [0, 1], at least two of every class and as many of each.
            labels: their classes, `[N]` int64.
        """
        features = self._features(images)
        of_classes = [torch.pdist(features[labels == label]).mean().item() for label in labels.unique()]
        return DenseFeatures(features, statistics.fmean(of_classes))

    def of(self, images: torch.Tensor, dense: DenseFeatures) -> dict[str, float]:
        """Return the metrics of images by name.

        Args:
            images: `[N, C, H, W]` float32 in [0, 1].
            dense: of the dense model's images with the same seed and labels, in the same order.

        Returns:
            `fid_lite0`: the FID to the real images. `distance_lite0`: the mean Euclidean distance between the features
            of each image and its dense one, over `dense.unit`. It is 0 for equal images. It is about 1 for images that
            have nothing but the class in common.
        """
        features = self._features(images)
        distance = (features - dense.features).norm(dim=1).mean().item()
        return {"fid_lite0": self._fid(features), "distance_lite0": distance / dense.unit}

    def fid_of(self, images: torch.Tensor) -> dict[str, float]:
        """Return the `fid_lite0` of images `[N, C, H, W]` float32 in [0, 1], which need no dense ones."""
        return {"fid_lite0": self._fid(self._features(images))}

    def _fid(self, features: torch.Tensor) -> float:
        self.frechet.reset()
        self.frechet.update(features, real=False)
        return self.frechet.compute().item()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return network_features(self.network, images, LITE0_BATCH).cpu()

    def _batches(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the features of some images at a time, since those of all would fill hundreds of MB."""
        for some in progress(images.split(BATCH), desc="real images by Lite0"):
            yield self._features(some)
