"""Measure divergence from dense, FLOPs and image quality of the trained adapters as rows of one CSV; resumable."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from actvar.evaluate.bundled import dense_predictions, training_image_quality
from actvar.evaluate.methods import Method, adapter_method
from actvar.evaluate.predictions import DensePredictions
from actvar.evaluate.quality import ImageQuality
from actvar.evaluate.run import Evaluation, Result, evaluate
from actvar.models import VAR
from actvar.patching.patch import unpatched
from actvar.utils.pictures import save_table
from actvar.zoo.pretrained import load_pretrained
from benchmarks.paper.train import adapter_file, runs_in_order
from benchmarks.paper.trainings import MAIN, SEEDS, TRAININGS
from benchmarks.paper.workers import Job, run_jobs

DENSE = "dense"
CFG = 1.5
BATCH = 250


@dataclass(frozen=True)
class Measured:
    """Hold one trained row from one seed, or the dense model with that seed.

    `stage`: after which the adapter was measured; `flops`: of the transformer for one image; `kl`, `kl_before` and
    `kl_last`: KL to the dense logits over all tokens, at the last scale but one and at the last, conditional rows, of
    token maps of test images; the rest of `num` images, None where none were drawn.
    """

    model: str
    recipe: str
    row: str
    stage: int
    seed: int
    flops: int
    kl: float
    kl_before: float
    kl_last: float
    num: int
    fid: float | None = None
    inception: float | None = None
    precision: float | None = None
    recall: float | None = None


def measure_all(
    work: Path, data: Path, num: int, device: torch.device, processes: int, known: Sequence[Measured]
) -> list[Measured]:
    """Measure every adapter in `work`, with as many images as `num`.

    Measured rows are kept in `work/measured`, and all rows so far in `work/results.csv`. Rows of `known` stay where
    `work` has no adapter. Rows of the dense models stay where `known` has as many images.
    """
    if num:
        _quality(data, device)  # keeps the statistics of the real images for all processes
    where = (work, data, num, device)
    measured = {row.model for row in known if row.row == DENSE and row.num >= num}
    jobs = [
        Job(f"{model}, {DENSE}", functools.partial(measure, model, SEEDS, ("", DENSE, 0), None, *where))
        for model in dict.fromkeys(training.model for training in TRAININGS)
        if model not in measured
    ]
    for training, seed in runs_in_order(TRAININGS):
        for stage in (2, 1) if training.row == MAIN else (2,):  # stage 1 of the main rows alone
            path = adapter_file(work, training, seed, stage)
            if path.exists():
                label = (training.recipe, training.row, stage)
                call = functools.partial(measure, training.model, (seed,), label, path, *where)
                jobs.append(Job(path.stem, call))
    found = {_place(row): row for row in known}
    for _, rows in run_jobs(jobs, processes, work):
        found |= {_place(row): row for row in rows}
        save_measured([found[place] for place in sorted(found)], work / "results.csv")
    return [found[place] for place in sorted(found)]


def _place(row: Measured) -> tuple[int, ...]:
    """Return where a row stands: by model, seed, row and stage, dense first."""
    places = {(t.model, t.recipe, t.row): place for place, t in enumerate(TRAININGS)}
    first = next(place for place, t in enumerate(TRAININGS) if t.model == row.model)
    return first, row.seed, places.get((row.model, row.recipe, row.row), -1), row.stage


def measure(
    model: str,
    seeds: Sequence[int],
    label: tuple[str, str, int],
    adapter: Path | None,
    work: Path,
    data: Path,
    num: int,
    device: torch.device,
) -> list[Measured]:
    """Return a row per seed of sampling, of an adapter or of the dense model; `label`: recipe, row and stage."""
    var, dense = _model(model, data, device)
    method = adapter_method(adapter.stem, adapter) if adapter else Method(DENSE, unpatched)
    quality = _quality(data, device) if num else None
    hows = [Evaluation(num=num or 100, seed=seed, rounds=0, cfg=CFG, batch=BATCH) for seed in seeds]
    results = [evaluate(var, [method], how, work / "measured", quality, dense)[0] for how in hows]
    return [
        _measured(result, var.patch_nums, model, *label, seed, num) for result, seed in zip(results, seeds, strict=True)
    ]


@functools.cache
def _model(model: str, data: Path, device: torch.device) -> tuple[VAR, DensePredictions]:
    vae, var = load_pretrained(model, device=device)
    return var, dense_predictions(vae, var, data, CFG)


@functools.cache
def _quality(data: Path, device: torch.device) -> ImageQuality:
    return training_image_quality(data, device)


def _measured(
    result: Result, sides: Sequence[int], model: str, recipe: str, row: str, stage: int, seed: int, num: int
) -> Measured:
    found = result.divergences["kl"]
    kl = sum(side**2 * of_scale for side, of_scale in zip(sides, found, strict=True)) / sum(side**2 for side in sides)
    quality = result.quality[0] if result.quality else {}
    images = [quality.get(name) for name in ("fid", "is", "precision", "recall")]
    return Measured(model, recipe, row, stage, seed, result.flops, kl, *found[-2:], num, *images)


def save_measured(rows: Sequence[Measured], path: Path) -> Path:
    names = [field.name for field in fields(Measured)]
    values = (
        ["" if v is None else f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values()] for row in rows
    )
    return save_table(path, names, values)


def load_measured(path: Path) -> list[Measured]:
    """Return what `save_measured` wrote."""
    kinds = {field.name: field.type for field in fields(Measured)}

    def value(name: str, text: str):
        if kinds[name] == "str":
            return text
        if kinds[name] == "int":
            return int(text)
        return float(text) if text else None

    with path.open(newline="", encoding="utf-8") as file:
        return [Measured(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]
