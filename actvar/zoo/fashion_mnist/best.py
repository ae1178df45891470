"""The adapter `best`: both stages of the recipe of that name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actvar.adapter import load_adapter, read_adapter_config, save_adapter
from actvar.checkpoint import load_var
from actvar.config import ActVARConfig
from actvar.distill.data import fashion_mnist_source
from actvar.distill.recipes import RECIPES
from actvar.distill.run import Distillation, distill
from actvar.patch import patch_silently, remove_patch
from actvar.zoo.checksums import checked, save_checksums

STEPS, BATCH = 1500, 32


def train_best(folder: Path, data: Path, work: Path, seed: int, steps: int = STEPS) -> Path:
    """Train the adapter of the exported model in `folder` for (0.75, 0.75; 0.75)'s FLOPs; resumes, like the stages
    before it. Returns its file in `work`.

    Args:
        folder: of `var.safetensors` and `vae.safetensors`.
        data: folder of the four idx files.
    """
    work.mkdir(parents=True, exist_ok=True)
    vae, var = _dense(folder)
    source = fashion_mnist_source(data, vae)
    calibrated, best = work / "calibrated.safetensors", work / "best.safetensors"
    stage1 = Distillation(1, RECIPES["best"], seed=seed)
    if not calibrated.exists():
        distill(vae, var, ActVARConfig(), None, source, stage1, calibrated)
        remove_patch(var)
    stage2 = replace(stage1, stage=2, epochs=steps / (len(source.labels) // BATCH), batch=BATCH, bf16=True)
    return distill(vae, var, read_adapter_config(calibrated), calibrated, source, stage2, best)


def ship(adapter: Path, name: str, folder: Path) -> None:
    """Write an adapter of the exported model to `folder` as `adapter-<name>.safetensors`, in float16."""
    _, var = _dense(folder)
    patch_silently(var, read_adapter_config(adapter))
    load_adapter(var, adapter)
    var.half()
    save_adapter(var, folder / f"adapter-{name}.safetensors")
    save_checksums(folder)


def _dense(folder: Path):
    return load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
