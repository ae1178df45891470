"""Compare ways to sample from Infinity: distance of images and bits from the dense model's, time, FLOPs. Resumable."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from actvar.baselines.replacing_methods import with_methods
from actvar.evaluate.lite0 import Lite0
from actvar.evaluate.lite0_quality import LITE0_BATCH
from actvar.evaluate.methods import Method
from actvar.evaluate.quality import network_features
from actvar.evaluate.run import Result, image_seconds
from actvar.evaluate.similarity import psnr, ssim
from actvar.evaluate.text_predictions import DenseBits
from actvar.execution import SAMPLERS
from actvar.families import family_of
from actvar.flops import CountByModule
from actvar.models.arguments import SEEDS, checked_integer
from actvar.models.vqvae import without_decoder
from actvar.patching.patch import unpatched
from actvar.sampling.samplers import drawn_by
from actvar.sampling.shards import Bulk, read_image, read_images, sample_many
from actvar.sampling.text_request import TextSampling
from actvar.utils.devices import device_of
from actvar.utils.fields import check_choice
from actvar.utils.fingerprint import model_fingerprint
from actvar.utils.parts import Parts
from actvar.utils.progress import progress
from actvar_kernels.backend import using_backend

MOST_PSNR = 100.0
"""The PSNR in dB that equal images count as, so that means are finite."""
COMPARED_BITS = 32
"""Images, the first ones, along which bits are predicted."""


@dataclass(frozen=True)
class TextEvaluation:
    """Settings of an evaluation: the images that are drawn by each method, and the timed batches.

    Args:
        sampling: all prompts once, with features; its seed is the first one.
        num: images per seed, as many of every prompt.
        repeats: number of seeds, which follow each other and are the same for every method.
        batch: images per batch, in sampling and in timing.
        rounds: timed batches of every method.
        sampler: by which all methods draw bits; None leaves each its own, which an adapter may recommend.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    sampling: TextSampling
    num: int
    repeats: int = 1
    batch: int = 1
    rounds: int = 5
    sampler: str | None = None

    def __post_init__(self):
        check_choice("sampler", self.sampler, (None, *SAMPLERS))
        for name, least in (("num", 1), ("repeats", 1), ("batch", 1), ("rounds", 0)):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), least))
        checked_integer("seed", self.sampling.seed, SEEDS[0], SEEDS[-1] - self.repeats + 1)
        self.bulk(self.seeds[0])

    @property
    def seeds(self) -> range:
        """Return the seeds of every method."""
        assert isinstance(self.sampling.seed, int)  # checked on construction
        return range(self.sampling.seed, self.sampling.seed + self.repeats)

    def bulk(self, seed: int) -> Bulk:
        """Return the request for the images of one seed.

        Raises:
            ValueError: a number that the prompts cannot share equally.
        """
        return Bulk(replace(self.sampling, seed=seed), self.num, self.batch)

    def timed(self, model: Any) -> TextSampling:
        """Return the request for a timed batch."""
        return self.first(self.batch)

    def first(self, images: int) -> TextSampling:
        """Return the request for the first images of the first seed."""
        bulk = replace(self.bulk(self.seeds[0]), batch=images)
        return replace(self.sampling, labels=bulk.labels_of(0), seed=bulk.seeds_of(0))

    def settings(self) -> dict[str, object]:
        """Return all settings, as JSON values."""
        own = {name: value for name, value in vars(self).items() if name != "sampling"}
        return self.sampling.settings() | own

    def draw(self, seed: int) -> dict[str, object]:
        """Return the settings on which the images of one seed depend."""
        return replace(self, sampling=replace(self.sampling, seed=seed), repeats=1, rounds=0).settings()


Judge = Callable[[Tensor], dict[str, float]]
"""Compares images `[N, C, H, W]` float32 in [0, 1] with real ones, and returns metrics by name."""


def evaluate_texts(
    infinity: nn.Module,
    methods: Sequence[Method],
    how: TextEvaluation,
    folder: Path,
    lite0: Lite0 | None = None,
    judges: Sequence[tuple[str, Judge]] = (),
) -> list[Result]:
    """Sample and measure every method; the parts that are finished are kept in `folder`.

    Images of the dense model are drawn too, and stay in `folder`. Times are never kept.

    Args:
        infinity: unpatched, on the device to evaluate on.
        methods: to evaluate.
        how: the settings.
        folder: of the finished parts.
        lite0: network of the distance from the dense images; None: it is not measured.
        judges: compare the images with real ones; each with a text that tells it from others.

    Returns:
        one result per method. Its `quality` has `psnr` and `ssim`, means over the images, with `lite0` the
        `distance_lite0`, and what the judges return. Its divergences are `kl_drawn`, see `DenseBits`.

    Raises:
        ValueError: fewer than two images with `lite0`.
    """
    if lite0 is not None and how.num < 2:
        raise ValueError(f"num: expected at least two images, whose distance is the unit of others, got {how.num}")
    compared = _Compared(infinity, how, Parts(folder), lite0, judges)
    results = []
    for method in progress(methods, desc="methods"):
        with method.applied(infinity), drawn_by(infinity, how.sampler):
            results.append(compared.result(method))
    for result, seconds in zip(results, image_seconds(infinity, methods, how), strict=True):
        result.seconds = seconds
    return results


def _fingerprint(infinity: nn.Module) -> str:
    return model_fingerprint(infinity, family_of(infinity).autoencoder(infinity))


class _Compared:
    """Measure methods beside the dense model, whose images of every seed are drawn at once and stay with the parts.

    Arguments are those of `evaluate_texts`, and `parts` for its folder.
    """

    def __init__(
        self,
        infinity: nn.Module,
        how: TextEvaluation,
        parts: Parts,
        lite0: Lite0 | None,
        judges: Sequence[tuple[str, Judge]],
    ):
        self.infinity, self.how, self.parts, self.lite0, self.judges = infinity, how, parts, lite0, judges
        self.folders: dict[int, Path] = {}
        with unpatched(infinity), drawn_by(infinity, how.sampler):
            facts = {"model": _fingerprint(infinity), "device": device_of(infinity).type}
            for seed in how.seeds:
                path = parts.path(f"dense-images-seed{seed}", facts | how.draw(seed))
                self.folders[seed] = path.with_suffix("")
                sample_many(infinity, how.bulk(seed), self.folders[seed])
            first = how.first(min(how.num, COMPARED_BITS))
            self.bits = DenseBits(infinity, list(first.each()))
        self.dense_features = functools.cache(lambda seed: self._features(self.folders[seed], seed))

    def result(self, method: Method) -> Result:
        """Return what is measured of a method, which is on the model, except for times."""
        infinity, how, parts = self.infinity, self.how, self.parts
        facts = {"method": method.name, "facts": method.facts, "model": _fingerprint(infinity)}
        drawn, is_dense = {**facts, **how.draw(how.seeds[0])}, method.applied is unpatched
        flops = parts.get(f"{method.name}-flops", drawn, lambda _: text_flops(infinity, how.first(1)))
        with_bits = {**drawn, "bits": self.bits.fingerprint}
        found = parts.get(f"{method.name}-divergence", with_bits, lambda _: self.bits.divergences(infinity))
        judged_by = {"judges": [name for name, _ in self.judges], "lite0": self.lite0 is not None}
        quality = [
            parts.get(
                f"{method.name}-seed{seed}",
                {**facts, **how.draw(seed), **judged_by},
                functools.partial(self._measured, seed=seed, is_dense=is_dense),
            )
            for seed in how.seeds
        ]
        return Result(method.name, quality, [], flops, found)

    def _measured(self, unfinished: Path, seed: int, is_dense: bool) -> dict[str, float]:
        """Return the metrics of the images of one seed, which are drawn into `unfinished` unless they are dense."""
        folder = self.folders[seed] if is_dense else unfinished
        sample_many(self.infinity, self.how.bulk(seed), folder)
        metrics = self.nearness(folder, seed)
        if self.judges:
            images = torch.cat(list(_images(folder, self.how.bulk(seed), self.how.num)))
            for _, judge in self.judges:
                metrics |= judge(images)
        return metrics

    def nearness(self, folder: Path, seed: int) -> dict[str, float]:
        """Return how near the images in `folder` are to the dense ones of the same seed.

        Returns:
            `psnr`, where equal images count `MOST_PSNR`, and `ssim`, means over the images; `distance_lite0`, the mean
            Euclidean distance of features over that of two dense images.
        """
        bulk = self.how.bulk(seed)
        pairs = zip(_images(folder, bulk), _images(self.folders[seed], bulk), strict=True)
        near = [(min(psnr(ours, dense), MOST_PSNR), ssim(ours, dense)) for ours, dense in pairs]
        found = {"psnr": statistics.fmean(p for p, _ in near), "ssim": statistics.fmean(s for _, s in near)}
        if self.lite0 is not None:
            features = self.dense_features(seed)
            distance = (self._features(folder, seed) - features).norm(dim=1).mean()
            found["distance_lite0"] = (distance / torch.pdist(features).mean()).item()
        return found

    def _features(self, folder: Path, seed: int) -> Tensor:
        """Return the features of all images in `folder`, `[N, F]`."""
        some = _images(folder, self.how.bulk(seed), LITE0_BATCH)
        return torch.cat([network_features(self.lite0, images, LITE0_BATCH).cpu() for images in some])


def _images(folder: Path, bulk: Bulk, count: int = 1) -> Iterator[Tensor]:
    """Yield the images in `folder`, some at a time, `[count, C, H, W]` float32 in [0, 1]."""
    for start in range(0, bulk.num, count):
        pixels = [torch.from_numpy(read_image(folder, bulk, i)) for i in range(start, min(start + count, bulk.num))]
        yield torch.stack(pixels).permute(0, 3, 1, 2).float() / 255


def shown_images(
    infinity: nn.Module, methods: Sequence[Method], how: TextEvaluation, folder: Path, count: int
) -> dict[str, np.ndarray]:
    """Return the first images of the first seed by every method, `[N, H, W, C]` uint8; they are kept in `folder`.

    Args:
        infinity, methods, how, folder: as in `evaluate_texts`.
        count: the most images of a method.
    """
    labels = how.first(min(count, how.num)).labels
    bulk = Bulk(replace(how.sampling, labels=labels), len(labels), how.batch)
    found = {}
    for method in progress(methods, desc="picture"):
        with method.applied(infinity), drawn_by(infinity, how.sampler):
            facts = {"facts": method.facts, "model": _fingerprint(infinity), "images": len(labels)}
            path = Parts(folder).path(f"{method.name}-shown", facts | how.draw(how.seeds[0])).with_suffix("")
            sample_many(infinity, bulk, path)
        found[method.name] = read_images(path, bulk)[0]
    return found


def text_flops(infinity: Any, sampling: TextSampling) -> int:
    """Return the transformer's FLOPs of a sample, counted by torch; those of decoding are not among them.

    The sample runs on the reference backend, so what a method changes in the sampling loop is counted.

    Args:
        infinity: a model with weights, with a method on or dense.
        sampling: the request, with features.
    """
    counts = CountByModule(infinity, family_of(infinity).weight_kinds)
    autoencoder = family_of(infinity).autoencoder(infinity)

    def decode(self, features):
        before = Counter(counts.flops)
        images = type(self).decode(self, features)
        counts.flops = before
        return images

    counter = FlopCounterMode(display=False, custom_mapping=counts.formulas())
    with (
        using_backend("reference"),
        without_decoder(infinity, "decode"),
        with_methods(autoencoder, decode=decode),  # SkipVAR decodes on the way
        counter,
    ):
        sampling.run(infinity)
    return counts.take().total
