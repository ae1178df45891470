"""Compare ways to sample from one model: image quality over seeds, divergence from dense, time, FLOPs. Resumable."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from actvar.evaluate.lite0_quality import DenseFeatures, Lite0Quality
from actvar.evaluate.methods import Method
from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import FEWEST_IMAGES, ImageQuality
from actvar.execution import SAMPLERS
from actvar.families import family_of
from actvar.flops import sampling_flops
from actvar.models import VAR
from actvar.models.arguments import SEEDS, checked_draw, checked_integer
from actvar.patching.patch import unpatched
from actvar.sampling.request import Sampling
from actvar.sampling.samplers import drawn_by
from actvar.sampling.shards import Bulk, read_images, sample_many, write_npz
from actvar.sampling.text_request import TextSampling
from actvar.sampling.timing import seconds_of
from actvar.utils.devices import device_of
from actvar.utils.fields import check_choice
from actvar.utils.fingerprint import model_fingerprint
from actvar.utils.parts import Parts
from actvar.utils.progress import progress


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation: the images that are drawn by each method, and the timed batches.

    Args:
        num: images per seed, as many of every class.
        seed: the first seed.
        repeats: number of seeds, which follow each other and are the same for every method.
        batch: images per batch, in sampling and in timing.
        cfg, top_k, top_p: see `VAR.autoregressive_infer_cfg`.
        rounds: timed batches of every method.
        sampler: by which all methods draw tokens; None leaves each its own, which an adapter may recommend.

    Numbers of any kind become Python's own.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    num: int = 5000
    seed: int = 0
    repeats: int = 1
    batch: int = 50
    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0
    rounds: int = 5
    sampler: str | None = None

    def __post_init__(self):
        check_choice("sampler", self.sampler, (None, *SAMPLERS))
        draw = checked_draw(None, self.cfg, self.top_k, self.top_p)
        numbers = {name: checked_integer(name, getattr(self, name), 1) for name in ("num", "repeats", "batch")}
        numbers["rounds"] = checked_integer("rounds", self.rounds, 0)
        numbers["seed"] = checked_integer("seed", self.seed, SEEDS[0], SEEDS[-1] - numbers["repeats"] + 1)
        numbers |= dict(cfg=draw.cfg, top_k=draw.top_k, top_p=draw.top_p)
        for name, number in numbers.items():
            object.__setattr__(self, name, number)

    def bulk(self, var: VAR, seed: int) -> Bulk:
        """Return the request for the images of one seed.

        Raises:
            ValueError: a number that the model's classes cannot share equally.
        """
        sampling = Sampling(tuple(range(var.num_classes)), self.cfg, self.top_k, self.top_p, seed)
        return Bulk(sampling, self.num, self.batch)

    def timed(self, model: VAR) -> Sampling:
        """Return the request for a timed batch."""
        labels = tuple(index % model.num_classes for index in range(self.batch))
        return Sampling(labels, self.cfg, self.top_k, self.top_p, self.seed)

    def settings(self) -> dict[str, object]:
        """Return all settings, as JSON values."""
        return asdict(self)

    def draw(self, seed: int) -> dict[str, object]:
        """Return the settings on which the images of one seed depend."""
        settings = asdict(replace(self, seed=seed, repeats=1, rounds=0))
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def seeds(self) -> range:
        """Return the seeds of every method."""
        return range(self.seed, self.seed + self.repeats)


@dataclass
class Result:
    """The results of one method, where what was not measured is empty.

    Args:
        name: of the method.
        quality: per seed the metrics of `actvar.evaluate.quality.METRICS`.
        seconds: per image of every timed batch.
        flops: per image.
        divergences: see `DensePredictions.divergences`.
    """

    name: str
    quality: list[dict[str, float]]
    seconds: list[float]
    flops: int
    divergences: dict[str, list[float | None]]


def evaluate(
    var: VAR,
    methods: Sequence[Method],
    how: Evaluation,
    folder: Path,
    quality: ImageQuality | None = None,
    dense: DensePredictions | None = None,
    lite0: Lite0Quality | None = None,
    repeated: Collection[str] | None = None,
) -> list[Result]:
    """Sample and measure every method; the parts that are finished are kept in `folder`.

    Times are never kept: each call measures those of its methods anew, in turn. With `lite0` the images of the dense
    model are drawn too, and stay in `folder`.

    Args:
        var: unpatched, on the device to evaluate on.
        methods: to evaluate.
        how: the settings.
        folder: of the finished parts.
        quality: compares the images with real ones; None: no images are drawn.
        dense: predictions of the dense model; None: no divergence is measured.
        lite0: compares the images that `quality` compares by another network; None: this is not measured.
        repeated: names of the methods whose images are drawn with all seeds, those of the others with the first one;
            None: all methods.

    Raises:
        ValueError: a number of images that the model's classes cannot share equally, or of fewer than 20, or with
            `lite0` of fewer than two of each class; `lite0` without `quality`.
    """
    parts = Parts(folder)
    how.bulk(var, how.seed)
    if quality and how.num < FEWEST_IMAGES:
        raise ValueError(f"num: expected at least {FEWEST_IMAGES} images to compare, got {how.num}")
    by_lite0 = None
    if lite0:
        if quality is None:
            raise ValueError("lite0: expected quality with it, without which no images are drawn")
        if how.num < 2 * var.num_classes:
            raise ValueError(f"num: expected at least two images of each of {var.num_classes} classes, got {how.num}")
        by_lite0 = _ByLite0(lite0, var, how, parts)
    results = []
    for method in progress(methods, desc="methods"):
        with method.applied(var), drawn_by(var, how.sampler):
            facts = {
                "method": method.name,
                "facts": method.facts,
                "model": model_fingerprint(var, family_of(var).autoencoder(var)),
            }
            flops = parts.get(f"{method.name}-flops", facts, lambda _: sampling_flops(var))
            found = {}
            if dense:
                dense_facts = facts | {"cfg": how.cfg, "tokens": dense.fingerprint}
                found = parts.get(f"{method.name}-divergence", dense_facts, lambda _: dense.divergences(var))
            seeds = how.seeds if repeated is None or method.name in repeated else how.seeds[:1]
            metrics = _metrics(parts, method, facts, var, how, seeds, quality, by_lite0) if quality else []
        results.append(Result(method.name, metrics, [], flops, found))
    for result, seconds in zip(results, image_seconds(var, methods, how), strict=True):
        result.seconds = seconds
    return results


class _ByLite0:
    """Compare by Lite0 with the dense images of every seed, which are drawn at once and stay with the parts.

    Args:
        lite0: the comparison.
        var: the model.
        how: the settings.
        parts: gives the folders of the images.
    """

    def __init__(self, lite0: Lite0Quality, var: VAR, how: Evaluation, parts: Parts):
        self.lite0, self.bulks, self.folders = lite0, {}, {}
        with unpatched(var), drawn_by(var, how.sampler):
            model = model_fingerprint(var, family_of(var).autoencoder(var))
            facts = {"model": model, "device": device_of(var).type}
            for seed in how.seeds:
                self.bulks[seed] = how.bulk(var, seed)
                self.folders[seed] = parts.path(f"dense-images-seed{seed}", facts | how.draw(seed)).with_suffix("")
                sample_many(var, self.bulks[seed], self.folders[seed])
        self.dense = functools.cache(self._dense)  # read and computed for the first unfinished part of a seed

    def of(self, images: torch.Tensor, seed: int) -> dict[str, float]:
        """Return the metrics of the images `[N, C, H, W]` that were drawn with a seed."""
        return self.lite0.of(images, self.dense(seed))

    def _dense(self, seed: int) -> DenseFeatures:
        return self.lite0.dense_features(*_read(self.folders[seed], self.bulks[seed]))


def _metrics(
    parts: Parts,
    method: Method,
    facts: Mapping[str, object],
    var: VAR,
    how: Evaluation,
    seeds: Sequence[int],
    quality: ImageQuality,
    by_lite0: _ByLite0 | None,
) -> list[dict[str, float]]:
    """Return the metrics of one method per seed, from the finished parts where these have them.

    Args:
        parts: finished parts.
        method: the method, which is on `var`.
        facts: on which the images depend, besides the settings.
        var: the model.
        how: the settings.
        seeds: of the images.
        quality: compares the images with real ones.
        by_lite0: compares them by another network; None: it does not.
    """

    def measured(folder: Path, seed: int) -> dict[str, float]:
        if by_lite0 is None:
            return quality.of(*sampled_images(var, how.bulk(var, seed), folder))
        drawn = by_lite0.folders[seed] if method.applied is unpatched else folder
        images, labels = sampled_images(var, how.bulk(var, seed), drawn)
        return quality.of(images, labels) | by_lite0.of(images, seed)

    judge = {"lite0": by_lite0.lite0.key} if by_lite0 else {}
    return [
        parts.get(
            f"{method.name}-seed{seed}",
            {**facts, **how.draw(seed), **judge},
            functools.partial(measured, seed=seed),
        )
        for seed in seeds
    ]


class Timed(Protocol):
    """Say which batches of every method are timed: how many, of how many images, drawn by which sampler."""

    @property
    def rounds(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def sampler(self) -> str | None: ...

    def timed(self, model: Any) -> Sampling | TextSampling:
        """Return the request for a timed batch."""
        ...


def image_seconds(var: Any, methods: Sequence[Method], how: Timed) -> list[list[float]]:
    """Return the seconds per image of `how.rounds` timed batches per method, all methods in turn.

    Each batch follows one of the same size that is not timed, which packs weights and takes its memory.

    Args:
        var: unpatched.
        methods: to time.
        how: the settings.
    """
    sampling, device = how.timed(var), device_of(var)
    seconds: list[list[float]] = [[] for _ in methods]
    with progress(total=how.rounds * len(methods), desc="timing") as bar:
        for _ in range(how.rounds):
            for method, method_seconds in zip(methods, seconds, strict=True):
                with method.applied(var), drawn_by(var, how.sampler):
                    sampling.run(var)
                    method_seconds.append(seconds_of(lambda: sampling.run(var), device) / how.batch)
                bar.update()
    return seconds


def write_samples(var: VAR, methods: Sequence[Method], how: Evaluation, folder: Path) -> list[Path]:
    """Write `<method>-seed<n>.npz` for OpenAI's evaluator, of every method and seed.

    An interrupted call goes on where it was, see `actvar.sampling.shards.sample_many`.

    Args:
        var: unpatched.
        methods: to sample.
        how: the settings.
        folder: of the files.

    Returns:
        The files.
    """
    written = []
    for method in methods:
        for seed in how.seeds:
            bulk, name = how.bulk(var, seed), f"{method.name}-seed{seed}"
            with method.applied(var), drawn_by(var, how.sampler):
                sample_many(var, bulk, folder / name)
            written.append(folder / f"{name}.npz")
            write_npz(folder / name, bulk, written[-1])
    return written


def sampled_images(var: VAR, bulk: Bulk, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of `bulk` and their labels.

    Images that `folder` has are not drawn again, see `actvar.sampling.shards.sample_many`.

    Args:
        var: the model with a method on.
        bulk: the images to draw.
        folder: keeps them.

    Returns:
        Images `[N, C, H, W]` float32 in [0, 1], in steps of 1 / 255, and labels `[N]` int64.
    """
    sample_many(var, bulk, folder)
    return _read(folder, bulk)


def _read(folder: Path, bulk: Bulk) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = read_images(folder, bulk)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)
