"""The table that decides the recipe `best`, one choice after the other: `python -m benchmarks.paper.recipes`.

KL to the dense logits at the last two scales, on token maps of test images, after a short stage 2 from given gates.
Resumable.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from actvar.adapter import load_adapter, read_adapter_config, save_adapter
from actvar.calibrate import calibrate
from actvar.calibrate.rates import blocks_flops
from actvar.config import ActVARConfig
from actvar.distill.data import fashion_mnist_source
from actvar.distill.recipes import RECIPES, Recipe
from actvar.distill.run import CALIBRATION_IMAGES, distill
from actvar.evaluate.divergence import divergence_by_scale
from actvar.patch import DENSE, patch_silently, remove_patch
from actvar.pictures import save_table
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER, load_split
from actvar.zoo.pretrained import adapter_path, load_pretrained
from benchmarks.paper.train import WORK, stage_of
from benchmarks.paper.trainings import ACTVAR

STEPS = 40
TEST_IMAGES = 200
COLUMNS = ("choice", "seed", "flops_saved", "gates_6x6", "gates_8x8", "stage2_6x6", "stage2_8x8")


@dataclass(frozen=True)
class Choice:
    """Gates and stage 2. `gates`: `paper`, the bundled adapter of stage 1; `contiguous`, `clustered` or `rates`: fitted
    in closed form, with uniform rates but for the last."""

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
    """Entry point."""
    parser = argparse.ArgumentParser("python -m benchmarks.paper.recipes", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="adapters and token maps (default paper-work)")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of both stages (default 0 1)")
    parser.add_argument("--out", type=Path, default=Path("docs/paper/recipes.csv"))
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.out)
    for seed, choice in tqdm([(seed, choice) for seed in options.seeds for choice in CHOICES], desc="choices"):
        if (choice.name, str(seed)) not in {(row[0], row[1]) for row in rows}:
            rows.append(_row(choice, seed, options.work, options.data))
            save_table(options.out, COLUMNS, rows)


def read_rows(path: Path) -> list[list[str]]:
    """The rows that were measured before, without the header."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _row(choice: Choice, seed: int, work: Path, data: Path) -> list[str]:
    """Train and measure one choice."""
    vae, var = load_pretrained("fashion-mnist")
    images, labels = (of_split[:TEST_IMAGES] for of_split in load_split(data, "t10k"))
    batches = [(labels, vae.quantize.teacher_input(vae.img_to_idxBl(images * 2 - 1)))]
    gates = _gates(var, choice, seed, work)
    config = read_adapter_config(gates)
    saved = 1 - blocks_flops(var, config) / blocks_flops(var, DENSE)
    load_adapter(var, gates)
    found = divergence_by_scale(var, batches)[-2:]
    remove_patch(var)
    source = fashion_mnist_source(data, vae)
    out = work / f"recipe-{choice.name}-seed{seed}.safetensors".replace(" ", "-").replace(":", "").replace(",", "")
    distill(vae, var, config, gates, source, stage_of(choice.recipe, 2, STEPS, seed, source), out)
    found += divergence_by_scale(var, batches)[-2:]
    return [choice.name, str(seed), f"{saved:.4f}", *(f"{kl:.4f}" for kl in found)]


def _gates(var, choice: Choice, seed: int, work: Path) -> Path:
    """`var` ends patched."""
    if choice.gates == "paper":
        path = adapter_path("fashion-mnist", "paper")
        patch_silently(var, read_adapter_config(path))
        return path
    path = work / f"gates-{choice.gates}-{choice.config.num_experts}-{choice.config.kv}-seed{seed}.safetensors"
    arguments = dict(uniform=choice.gates != "rates", cluster=choice.gates != "contiguous")
    if path.exists():
        patch_silently(var, read_adapter_config(path))
    else:
        calibrate(var, choice.config, images=CALIBRATION_IMAGES, seed=seed, **arguments)
        save_adapter(var, path)
    return path


if __name__ == "__main__":
    main()
