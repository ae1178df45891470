"""Divergence from dense, FLOPs and image quality of the trained adapters, as rows of one CSV. Resumable."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from actvar.evaluate.bundled import dense_predictions, training_image_quality
from actvar.evaluate.methods import Method, adapter_method
from actvar.evaluate.run import Evaluation, Result, evaluate
from actvar.patch import unpatched
from actvar.pictures import save_table
from actvar.zoo.pretrained import load_pretrained
from benchmarks.paper.train import adapter_file
from benchmarks.paper.trainings import MAIN, SEEDS, TRAININGS, Training

logger = logging.getLogger(__name__)
DENSE = "dense"
CFG = 1.5


@dataclass(frozen=True)
class Measured:
    """One trained row from one seed, or the dense model with that seed.

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


def measure_all(work: Path, data: Path, num: int) -> list[Measured]:
    """Measure every adapter in `work`, with as many images as `num`; what was measured is kept in `work/measured`."""
    found: list[Measured] = []
    quality = training_image_quality(data) if num else None
    models = list(dict.fromkeys(training.model for training in TRAININGS))
    for model in models:
        vae, var = load_pretrained(model)
        dense = dense_predictions(vae, var, data, CFG)
        for seed in (bar := tqdm(SEEDS, desc=model)):
            runs = [run for run in _runs(work, model, seed) if run[2].exists()]
            bar.set_postfix_str(f"{len(runs)} adapters")
            methods = [Method(DENSE, unpatched), *(adapter_method(path.stem, path) for _, _, path in runs)]
            how = Evaluation(num=num or 100, seed=seed, rounds=0, cfg=CFG)
            results = evaluate(var, methods, how, work / "measured", quality, dense)
            labels = [("", DENSE, 0), *((training.recipe, training.row, stage) for training, stage, _ in runs)]
            for label, result in zip(labels, results, strict=True):
                found.append(_measured(result, var.patch_nums, model, *label, seed, num))
    return found


def _runs(work: Path, model: str, seed: int) -> list[tuple[Training, int, Path]]:
    """Training, stage and file of every adapter of one model and seed; stage 1 of the main rows alone."""
    of_model = [training for training in TRAININGS if training.model == model and seed in training.seeds]
    return [
        (training, stage, adapter_file(work, training, seed, stage))
        for training in of_model
        for stage in ((1, 2) if training.row == MAIN else (2,))
    ]


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
    """What `save_measured` wrote."""
    kinds = {field.name: field.type for field in fields(Measured)}

    def value(name: str, text: str):
        if kinds[name] == "str":
            return text
        if kinds[name] == "int":
            return int(text)
        return float(text) if text else None

    with path.open(newline="", encoding="utf-8") as file:
        return [Measured(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]
