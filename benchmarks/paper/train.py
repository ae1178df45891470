"""Train the adapters behind the paper's tables, those that are missing: `python -m benchmarks.paper.train`.

Rows with several seeds come first, seed by seed. Resumes where it was interrupted. On CPUs by two processes that share
each training: `torchrun --nproc-per-node 2 -m benchmarks.paper.train`; on a GPU, which one such training does not fill,
by processes that take whole ones: `--device cuda --processes 14`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actvar.baselines.static_pruning import fix_experts, wanda_units
from actvar.distill.data import Source, cached_tokens, fashion_mnist_source
from actvar.distill.recipes import Recipe
from actvar.distill.run import Distillation, distill
from actvar.models.checkpoint import usable_device
from actvar.patching.adapter import read_adapter_config, save_adapter
from actvar.patching.patch import load_adapter, patch_silently
from actvar.training.processes import barrier, launched_processes, rank, world_size
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER
from actvar.zoo.pretrained import load_pretrained
from actvar_kernels.cpu_backend import cpu
from benchmarks.paper.trainings import BATCH, LR, SEEDS, STEPS, TRAININGS, Training
from benchmarks.paper.workers import Job, run_jobs

WORK = Path("paper-work")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser("python -m benchmarks.paper.train", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    runs = [run for run in runs_in_order(TRAININGS) if not adapter_file(options.work, *run).exists()]
    with launched_processes(options.device) as device:
        if world_size() > 1 and options.processes > 1:
            parser.error("--processes: torchrun has started processes already")
        where = (options.work, options.data, device)
        prepare_tokens(dict.fromkeys(training.model for training, _ in runs), *where)
        for _ in run_jobs(jobs_of(runs, *where), options.processes, options.work):
            pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all commands of this package take."""
    parser.add_argument("--work", type=Path, default=WORK, help="adapters, losses and token maps (default paper-work)")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    parser.add_argument("--processes", type=int, default=1, help="that share the device (default 1)")


def runs_in_order(trainings: Sequence[Training]) -> list[tuple[Training, int]]:
    """Return every training with its seeds: rows with several seeds first, seed by seed."""
    runs = [(training, seed) for seed in SEEDS for training in trainings if seed in training.seeds]
    return sorted(runs, key=lambda run: len(run[0].seeds) == 1)


def prepare_tokens(models: Iterable[str], work: Path, data: Path, device: torch.device) -> None:
    """Make the token maps that the trainings of these models share."""
    for model in models:
        vae, var = load_pretrained(model, device=device)
        cached_tokens(fashion_mnist_source(data, vae), var, work)


def jobs_of(runs: Sequence[tuple[Training, int]], work: Path, data: Path, device: torch.device) -> list[Job]:
    """Return a job per run, and before it one for a stage 1 that it needs and that is trained or fitted."""
    jobs: dict[str, Job] = {}
    for training, seed in runs:
        gates = adapter_file(work, owner_of(training), seed, stage=1)
        if gates.stem not in jobs and not gates.exists():
            call = functools.partial(gates_of, owner_of(training), seed, work, data, device)
            jobs[gates.stem] = Job(gates.stem, call)
        name = adapter_file(work, training, seed).stem
        jobs[name] = Job(name, functools.partial(train, training, seed, work, data, device), after=(gates.stem,))
    return list(jobs.values())


def adapter_file(work: Path, training: Training, seed: int, stage: int = 2) -> Path:
    return work / f"{training.name}-seed{seed}-stage{stage}.safetensors"


def train(training: Training, seed: int, work: Path, data: Path, device: torch.device) -> Path:
    """Train both stages of one row from one seed, except what is there; return the adapter's file."""
    gates = gates_of(training, seed, work, data, device)
    vae, var = load_pretrained(training.model, device=device)
    source = fashion_mnist_source(data, vae)
    how = stage_of(training.how, 2, STEPS[2], seed, source, device)
    return distill(var, read_adapter_config(gates), gates, source, how, adapter_file(work, training, seed))


def stage_of(recipe: Recipe, stage: int, steps: int, seed: int, source: Source, device: torch.device) -> Distillation:
    """Return a stage of so many steps, in bfloat16 where the device multiplies it."""
    lr = None if recipe.muon and stage == 2 else LR[stage]
    epochs = steps / (len(source.conditions) // BATCH)
    bf16 = device.type != "cpu" or cpu.multiplies_bfloat16()
    return Distillation(stage, recipe, epochs=epochs, batch=BATCH, lr=lr, bf16=bf16, seed=seed)


def gates_of(training: Training, seed: int, work: Path, data: Path, device: torch.device) -> Path:
    """Return the file of stage 1 of a row: its own, or that of another row at its own rates."""
    path = adapter_file(work, training, seed, stage=1)
    if path.exists():
        return path
    vae, var = load_pretrained(training.model, device=device)
    owner = owner_of(training)
    if owner == training:
        if training.config.is_sparse:
            source = fashion_mnist_source(data, vae)
            how = stage_of(training.how, 1, STEPS[1], seed, source, device)
            return distill(var, training.config, None, source, how, path)
        patch_silently(var, training.config)
        return _saved(var, path)
    others = gates_of(owner, seed, work, data, device)
    config = read_adapter_config(others)
    patch_silently(var, config if training.static else replace(training.config, num_experts=config.num_experts))
    load_adapter(var, others)
    if training.static:
        fix_experts(var, wanda_units(var, 1.0))
    return _saved(var, path)


def owner_of(training: Training) -> Training:
    """Return the row whose stage 1 a row uses."""
    if training.gates_of is None:
        return training
    wanted = (training.gates_of, training.recipe, training.model)
    return next(t for t in TRAININGS if (t.row, t.recipe, t.model) == wanted)


def _saved(var: torch.nn.Module, path: Path) -> Path:
    """Return the adapter's file, which the first process writes."""
    if rank() == 0:
        save_adapter(var, path)
    barrier()
    return path


if __name__ == "__main__":
    main()
