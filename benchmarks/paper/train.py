"""Train the adapters behind the paper's tables, those that are missing: `python -m benchmarks.paper.train`.

Seed by seed, in the order of the list. Resumes where it was interrupted. By two processes: `torchrun --nproc-per-node 2
-m benchmarks.paper.train`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from actvar.adapter import load_adapter, read_adapter_config, save_adapter
from actvar.baselines.static_pruning import wanda_units
from actvar.distill.data import Source, fashion_mnist_source
from actvar.distill.recipes import Recipe
from actvar.distill.run import Distillation, distill
from actvar.gates import update
from actvar.patch import patch_silently
from actvar.training import barrier, launched_processes, rank
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER
from actvar.zoo.pretrained import load_pretrained
from benchmarks.paper.trainings import BATCH, LR, SEEDS, STEPS, TRAININGS, Training

WORK = Path("paper-work")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("python -m benchmarks.paper.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="adapters, losses and token maps (default paper-work)")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's idx files")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    runs = [(training, seed) for seed in SEEDS for training in TRAININGS if seed in training.seeds]
    missing = [run for run in runs if not adapter_file(options.work, *run).exists()]
    with launched_processes(torch.device("cpu")):
        for training, seed in (bar := tqdm(missing, desc="trainings", disable=rank() != 0)):
            bar.set_postfix_str(f"{training.name}, seed {seed}")
            train(training, seed, options.work, options.data)


def adapter_file(work: Path, training: Training, seed: int, stage: int = 2) -> Path:
    return work / f"{training.name}-seed{seed}-stage{stage}.safetensors"


def train(training: Training, seed: int, work: Path, data: Path) -> Path:
    """Both stages of one row from one seed; what is there is not trained again. Returns the adapter's file."""
    gates = _gates(training, seed, work, data)
    vae, var = load_pretrained(training.model)
    source = fashion_mnist_source(data, vae)
    how = stage_of(training.how, 2, STEPS[2], seed, source)
    return distill(vae, var, read_adapter_config(gates), gates, source, how, adapter_file(work, training, seed))


def stage_of(recipe: Recipe, stage: int, steps: int, seed: int, source: Source) -> Distillation:
    """A stage of so many steps."""
    lr = None if recipe.muon and stage == 2 else LR[stage]
    epochs = steps / (len(source.labels) // BATCH)
    return Distillation(stage, recipe, epochs=epochs, batch=BATCH, lr=lr, bf16=True, seed=seed)


def _gates(training: Training, seed: int, work: Path, data: Path) -> Path:
    """Stage 1 of a row: its own, or that of another row at its own rates."""
    path = adapter_file(work, training, seed, stage=1)
    if path.exists():
        return path
    vae, var = load_pretrained(training.model)
    if training.gates_of is None:
        if training.config.is_sparse:
            source = fashion_mnist_source(data, vae)
            how = stage_of(training.how, 1, STEPS[1], seed, source)
            return distill(vae, var, training.config, None, source, how, path)
        patch_silently(var, training.config)
        return _saved(var, path)
    whose = next(t for t in TRAININGS if (t.row, t.recipe, t.model) == _owner(training))
    others = _gates(whose, seed, work, data)
    patch_silently(var, replace(training.config, num_experts=read_adapter_config(others).num_experts))
    load_adapter(var, others)
    if training.static:
        fix_experts(var)
    return _saved(var, path)


def _saved(var: torch.nn.Module, path: Path) -> Path:
    """The adapter's file, which the first process writes."""
    if rank() == 0:
        save_adapter(var, path)
    barrier()
    return path


def _owner(training: Training) -> tuple[str | None, str, str]:
    return training.gates_of, training.recipe, training.model


@torch.no_grad()
def fix_experts(var: torch.nn.Module) -> None:
    """Static pruning as gates of a patched model: the first experts are on for every token and hold the hidden units
    that Wanda ranks highest; the others are never on."""
    rate = var.actvar.config.ffn_rate
    kept = wanda_units(var, rate)
    for block, units in zip(var.blocks, kept, strict=True):
        gates = block.actvar
        others = torch.ones(len(gates.places), dtype=torch.bool).index_fill_(0, units, False).nonzero().flatten()
        bias = -torch.arange(len(gates.router.bias), dtype=torch.float32)
        values = {gates.router.weight: torch.zeros_like(gates.router.weight), gates.router.bias: bias}
        update(block, torch.cat((units, others)), values)


if __name__ == "__main__":
    main()
