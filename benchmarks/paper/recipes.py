"""Measure the table that decides the recipe `best`, one choice after the other: `python -m benchmarks.paper.recipes`.

KL to the dense logits at the last two scales, on token maps of test images, after a short stage 2 from given gates.
Resumable.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from actvar.calibrate import calibrate
from actvar.calibrate.rates import blocks_flops
from actvar.config import DENSE, ActVARConfig
from actvar.distill.data import fashion_mnist_source
from actvar.distill.recipes import RECIPES, Recipe
from actvar.distill.run import CALIBRATION_IMAGES, distill
from actvar.evaluate.bundled import batches_of_test_images
from actvar.evaluate.divergence import divergence_by_scale
from actvar.patching.adapter import read_adapter_config, save_adapter
from actvar.patching.patch import load_adapter, remove_patch
from actvar.utils.pictures import save_table
from actvar.zoo.pretrained import adapter_path, load_pretrained
from benchmarks.paper.train import add_arguments, prepare_tokens, stage_of
from benchmarks.paper.trainings import ACTVAR
from benchmarks.paper.workers import Job, run_jobs

STEPS = 40
COLUMNS = ("choice", "seed", "flops_saved", "gates_6x6", "gates_8x8", "stage2_6x6", "stage2_8x8")


@dataclass(frozen=True)
class Choice:
    """Name gates and stage 2.

    The gates are `paper`, the bundled adapter of stage 1, or fitted in closed form: `contiguous`, `clustered` or
    `rates`. Only `rates` has rates that are not uniform.
    """

    name: str
    gates: str
    recipe: Recipe
    config: ActVARConfig = ACTVAR


PAPER, BEST = RECIPES["paper"], RECIPES["best"]
CHOICES = (
    Choice("paper", "paper", PAPER),
    Choice("gates in closed form", "contiguous", PAPER),
    Choice("clustered experts", "clustered", PAPER),
    Choice("logits alone", "clustered", replace(PAPER, losses=("output",))),
    Choice("Muon", "clustered", BEST),
    Choice("rates per block: best", "rates", BEST),
    # what does not win over `best`
    Choice("best, block loss too", "rates", replace(BEST, losses=("block", "output"))),
    Choice("best, true tokens too", "rates", replace(BEST, losses=("cls", "output"))),
    Choice("best, 32 experts", "rates", BEST, ActVARConfig(num_experts=32)),
    Choice("Muon, keys of all tokens", "clustered", BEST, ActVARConfig(kv="all")),
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.paper.recipes", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of both stages (default 0 1)")
    parser.add_argument("--out", type=Path, default=Path("docs/paper/recipes.csv"))
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = {(row[0], row[1]): row for row in read_rows(options.out)}
    where = (options.work, options.data, options.device)
    prepare_tokens(["fashion-mnist"], *where)
    pairs = [(choice, seed) for seed in options.seeds for choice in CHOICES]
    jobs = jobs_of([pair for pair in pairs if (pair[0].name, str(pair[1])) not in rows], *where)
    for _, row in run_jobs(jobs, options.processes, options.work):
        if row is not None:
            rows[row[0], row[1]] = row
            order = [(choice.name, str(seed)) for choice, seed in pairs]
            save_table(options.out, COLUMNS, sorted(rows.values(), key=lambda row: order.index((row[0], row[1]))))


def jobs_of(pairs: Sequence[tuple[Choice, int]], work: Path, data: Path, device: torch.device) -> list[Job]:
    """Return a job per choice and seed that returns its row, and before them one for every file of gates."""
    jobs: dict[str, Job] = {}
    for choice, seed in pairs:
        gates = gates_file(choice, seed, work)
        if not gates.exists():
            jobs.setdefault(gates.stem, Job(gates.stem, functools.partial(fit_gates, choice, seed, gates, device)))
        name = f"{choice.name}, seed {seed}"
        jobs[name] = Job(name, functools.partial(measure, choice, seed, work, data, device), after=(gates.stem,))
    return list(jobs.values())


def read_rows(path: Path) -> list[list[str]]:
    """Return the rows that were measured before, without the header."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def measure(choice: Choice, seed: int, work: Path, data: Path, device: torch.device) -> list[str]:
    """Train and measure one choice from its gates; return a row of the table."""
    vae, var = load_pretrained("fashion-mnist", device=device)
    batches = batches_of_test_images(vae, data)
    gates = gates_file(choice, seed, work)
    config = read_adapter_config(gates)
    saved = 1 - blocks_flops(var, config, batches[0][0]) / blocks_flops(var, DENSE, batches[0][0])
    load_adapter(var, gates)
    found = divergence_by_scale(var, batches)[-2:]
    remove_patch(var)
    source = fashion_mnist_source(data, vae)
    out = work / f"recipe-{choice.name}-seed{seed}.safetensors".replace(" ", "-").replace(":", "").replace(",", "")
    distill(var, config, gates, source, stage_of(choice.recipe, 2, STEPS, seed, source, device), out)
    found += divergence_by_scale(var, batches)[-2:]
    return [choice.name, str(seed), f"{saved:.4f}", *(f"{kl:.4f}" for kl in found)]


def gates_file(choice: Choice, seed: int, work: Path) -> Path:
    if choice.gates == "paper":
        return adapter_path("fashion-mnist", "paper-stage1")
    return work / f"gates-{choice.gates}-{choice.config.num_experts}-{choice.config.kv}-seed{seed}.safetensors"


def fit_gates(choice: Choice, seed: int, path: Path, device: torch.device) -> None:
    """Fit selectors and routers in closed form."""
    _, var = load_pretrained("fashion-mnist", device=device)
    arguments = dict(uniform=choice.gates != "rates", cluster=choice.gates != "contiguous")
    calibrate(var, choice.config, images=CALIBRATION_IMAGES, seed=seed, **arguments)
    save_adapter(var, path)


if __name__ == "__main__":
    main()
