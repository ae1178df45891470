"""The adapter `best`: calibrated without data, then stage 2 of the distillation."""

from __future__ import annotations

from pathlib import Path

from actvar.adapter import load_adapter, read_adapter_config, save_adapter
from actvar.calibrate import calibrate
from actvar.checkpoint import load_var
from actvar.distill.data import source_of
from actvar.distill.run import Distillation, distill
from actvar.patch import patch_silently, remove_patch
from actvar.zoo.checksums import checked, save_checksums

EPOCHS = 0.4  # 750 steps


def train_best(folder: Path, data: Path, work: Path, seed: int, epochs: float = EPOCHS, images: int = 64) -> Path:
    """Train the adapter of the exported model in `folder` for (0.75, 0.75; 0.75)'s FLOPs; resumes, like the stages
    before it. Returns its file in `work`.

    Args:
        folder: of `var.safetensors` and `vae.safetensors`.
        data: folder of the four idx files.
        images: samples to calibrate with.
    """
    work.mkdir(parents=True, exist_ok=True)
    vae, var = _dense(folder)
    calibrated, best = work / "calibrated.safetensors", work / "best.safetensors"
    if not calibrated.exists():
        calibrate(var, images=images, seed=seed)
        save_adapter(var, calibrated)
        remove_patch(var)
    how = Distillation(stage=2, epochs=epochs, batch=32, lr=1e-3, bf16=True, seed=seed)
    config, source = read_adapter_config(calibrated), source_of(str(data), vae, var, 0, seed)
    return distill(vae, var, config, calibrated, source, how, best)


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
