"""Image quality by the features of a frozen network: FID, Inception Score, precision, recall, and the wanted class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from actvar.evaluate.precision_recall import precision_recall, radii
from actvar.utils.files import replacing
from actvar.utils.fingerprint import fingerprint

T = TypeVar("T", bound="Moments")

BATCH = 500
NEIGHBOURS = 3
MANIFOLD = 10_000
"""Real images, evenly spaced, whose neighbourhoods are the real manifold of precision and recall."""
FEWEST_IMAGES = 20
"""Images that the Inception Score, in ten parts, needs."""
METRICS = ("fid", "is", "precision", "recall", "agreement", "fid_lite0", "distance_lite0", "psnr", "ssim")
"""Names of what `ImageQuality` measures, then `actvar.evaluate.lite0_quality`, then `actvar.evaluate.texts`."""


@dataclass(frozen=True)
class Moments:
    """Hold what FID needs to know about real images.

    Args:
        features_sum: sum of the features over all images, `[F]` float64, by torchmetrics.
        features_cov_sum: sum of their outer products, `[F, F]` float64, by torchmetrics.
        count: number of all images, `[]` int64.
    """

    features_sum: torch.Tensor
    features_cov_sum: torch.Tensor
    count: torch.Tensor

    def frechet(self) -> FrechetInceptionDistance:
        """Return the FID to these images, of features that its `update` is given."""
        frechet = FrechetInceptionDistance(feature=_as_given(self.features_sum.numel()))
        frechet.reset_real_features = False
        frechet.real_features_sum = self.features_sum
        frechet.real_features_cov_sum = self.features_cov_sum
        frechet.real_features_num_samples = self.count
        return frechet


@dataclass(frozen=True)
class RealImages(Moments):
    """Hold statistics of real images.

    Args:
        features_sum, features_cov_sum, count: see `Moments`.
        manifold: features of some images, `[M, F]` float32.
        manifold_radii: distances of these features to their third neighbours, `[M]` float64.
    """

    manifold: torch.Tensor
    manifold_radii: torch.Tensor


class ImageQuality:
    """A comparison of images with real ones; features and their neighbourhoods are computed on the network's device.

    Args:
        network: a classifier in eval mode with `features(images)` `[B, F]` and `classifier(features)` `[B, classes]`.
        real: see `real_images`.
    """

    def __init__(self, network: Any, real: RealImages):
        self.network, self.real = network, real
        self.frechet = real.frechet()

    @torch.no_grad()
    def of(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, float]:
        """Return the metrics of images by name.

        Args:
            images: `[N, C, H, W]` float32 in [0, 1], at least 20.
            labels: their classes, `[N]` int64; None where these are not known.

        Returns:
            `fid`; `is`, the Inception Score in ten parts of a fixed random order; `precision` and `recall` by three
            neighbours; and with `labels` `agreement`, the share of images that the network puts into their class.

        Raises:
            ValueError: there are fewer images.
        """
        if len(images) < FEWEST_IMAGES:
            raise ValueError(f"expected at least {FEWEST_IMAGES} images to compare, got {len(images)}")
        features = network_features(self.network, images)
        logits = self.network.classifier(features).cpu()
        self.frechet.reset()
        self.frechet.update(features.cpu(), real=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that it keeps all logits in memory
            score = InceptionScore(feature=_as_given(logits.shape[1]))
        score.update(logits)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            inception = score.compute()[0].item()
        manifold, manifold_radii = (t.to(features.device) for t in (self.real.manifold, self.real.manifold_radii))
        precision, recall = precision_recall(manifold, manifold_radii, features, NEIGHBOURS)
        found = {"fid": self.frechet.compute().item(), "is": inception, "precision": precision, "recall": recall}
        if labels is not None:
            found["agreement"] = (logits.argmax(dim=1) == labels).float().mean().item()
        return found


def real_images(network: nn.Module, images: torch.Tensor, cache: Path | None = None) -> RealImages:
    """Return the statistics of real images.

    Args:
        network: see `ImageQuality`.
        images: `[N, C, H, W]` float32 in [0, 1].
        cache: see `kept`, where the key is a hash of the network's weights and the images.
    """
    return kept(RealImages, cache, image_key(network, images), lambda: _statistics(network, images))


def kept(kind: type[T], cache: Path | None, key: str, compute: Callable[[], T]) -> T:
    """Return the result of `compute()`, from this call or an earlier one.

    Args:
        kind: class of the result.
        cache: folder that keeps the result; None: nothing is kept. A file that cannot be read is made again.
        key: identifies what the result follows from.
        compute: gives the result.
    """
    if cache is None:
        return compute()
    path = cache / f"real-images-{key}.safetensors"
    if path.exists():
        try:
            return kind(**load_file(path))
        except (SafetensorError, TypeError, OSError):
            pass
    real = compute()
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(asdict(real), temporary)
    return real


def _statistics(network: nn.Module, images: torch.Tensor) -> RealImages:
    features = network_features(network, images)
    some = features[
        torch.linspace(0, len(features) - 1, min(MANIFOLD, len(features)), dtype=torch.float64, device="cpu")
        .round()
        .long()
    ].contiguous()
    return RealImages(
        **vars(moments(features.shape[1], [features])),
        manifold=some.cpu(),
        manifold_radii=radii(some, NEIGHBOURS).cpu(),
    )


def moments(width: int, batches: Iterable[torch.Tensor]) -> Moments:
    """Return the sums over features.

    Args:
        width: number of features of an image, F.
        batches: features `[B, F]` float32 of some images each.
    """
    frechet = FrechetInceptionDistance(feature=_as_given(width))
    for features in batches:
        frechet.update(features.cpu(), real=True)
    return Moments(frechet.real_features_sum, frechet.real_features_cov_sum, frechet.real_features_num_samples)


def cache_folder() -> Path:
    """Return the folder for statistics of real images: `actvar` in `XDG_CACHE_HOME`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actvar"


@torch.no_grad()
def network_features(network: Any, images: torch.Tensor, batch: int = BATCH) -> torch.Tensor:
    """Return the features of images in batches, `[N, F]` on the network's device.

    Args:
        network: see `ImageQuality`.
        images: `[N, C, H, W]` float32 in [0, 1].
        batch: images at a time.
    """
    device = next(network.parameters()).device
    return torch.cat([network.features(some.to(device)) for some in images.split(batch)])


def _as_given(features: int) -> nn.Module:
    """Return a network for torchmetrics that gives back its input, which are features already."""
    network: Any = nn.Identity()
    network.num_features = features
    return network


def image_key(network: nn.Module, images: torch.Tensor) -> str:
    """Return a hash of the network's weights and the images.

    Args:
        network: see `ImageQuality`.
        images: `[N, C, H, W]` float32.
    """
    return fingerprint([*network.state_dict().items(), ("images", images)])[:16]
