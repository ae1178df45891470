"""The adapters `paper` and `best`: both stages of the recipe of that name, and for `best` a second stage 2, of the
recipe `guided`; and static pruning, trained as `best` is at first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from actvar.baselines.static_pruning import SCORES, fix_experts
from actvar.config import ActVARConfig
from actvar.distill.data import Source, fashion_mnist_source
from actvar.distill.recipes import RECIPES
from actvar.distill.run import Distillation, distill
from actvar.models import VAR, VQVAE
from actvar.models.checkpoint import load_var
from actvar.patching.adapter import describe_adapter, read_adapter_config, save_adapter
from actvar.patching.patch import load_adapter, patched_silently, remove_patch
from actvar.utils.files import replacing
from actvar.zoo.checksums import checked, save_checksums
from actvar_kernels.cpu_backend import cpu

STEPS = {"paper": 1000, "best": 8000, "guided": 5000}
STATIC_STEPS = 1500
STAGE2 = {
    # so few steps need more than the paper's rate
    "paper": Distillation(2, RECIPES["paper"], batch=32, lr=1e-3, bf16=cpu.multiplies_bfloat16()),
    "best": Distillation(2, RECIPES["best"], batch=32, bf16=cpu.multiplies_bfloat16()),
}
GUIDED = Distillation(2, RECIPES["guided"], batch=16, lr=1e-3, bf16=cpu.multiplies_bfloat16())
"""How the adapter `best` is trained on, for samples with guidance."""
STATIC = {"static-magnitude": ("magnitude", 0.75), "static-wanda": ("wanda", 0.75), "static-wanda@0.5": ("wanda", 0.5)}
"""Trained static pruning: the score by which hidden units stay, and their share."""


def train_adapter(name: str, folder: Path, data: Path, work: Path, seed: int, steps: int | None = None) -> Path:
    """Train an adapter of the exported model in `folder` for the FLOPs of (0.75, 0.75; 0.75); resumes, like the stages
    before it. Returns its file in `work`.

    Args:
        name: `"paper"` or `"best"`.
        folder: of `var`, `vae` and `adapter-paper-stage1` `.safetensors`.
        data: folder of the four idx files.
        steps: of every stage 2; None for those of `STEPS`.
    """
    work.mkdir(parents=True, exist_ok=True)
    vae, var = _dense(folder)
    source = fashion_mnist_source(data, vae)
    gates = checked(folder / "adapter-paper-stage1.safetensors")
    stage2 = STAGE2[name]
    if stage2.recipe.calibrated:
        gates = work / "calibrated.safetensors"
        if not gates.exists():
            distill(var, ActVARConfig(), None, source, replace(stage2, stage=1, seed=seed), gates)
            remove_patch(var)
    config, how = read_adapter_config(gates), _of_steps(stage2, steps or STEPS[name], seed, source)
    trained = distill(var, config, gates, source, how, work / f"{name}.safetensors")
    if name != "best":
        return trained
    how = _of_steps(GUIDED, steps or STEPS["guided"], seed + 1, source)
    return distill(var, config, trained, source, how, work / "best-guided.safetensors")


def train_static(name: str, folder: Path, data: Path, work: Path, seed: int, steps: int = STATIC_STEPS) -> Path:
    """Train static pruning of the FFN's hidden units at the last two scales as `best` is trained at first, in fewer
    steps; arguments, resuming and result as in `train_adapter`.

    Args:
        name: of `STATIC`; the units are those of the baseline that is not trained.
    """
    score, rate = STATIC[name]
    config = ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=rate)
    work.mkdir(parents=True, exist_ok=True)
    vae, var = _dense(folder)
    source = fashion_mnist_source(data, vae)
    gates = work / f"{name}-gates.safetensors"
    if not gates.exists():
        units = SCORES[score](var, rate)
        with patched_silently(var, config, None):
            fix_experts(var, units)
            save_adapter(var, gates)
    how = _of_steps(STAGE2["best"], steps, seed, source)
    return distill(var, config, gates, source, how, work / f"{name}.safetensors")


def ship(adapter: Path, name: str, folder: Path, kind: str = "adapter") -> None:
    """Write an adapter of the exported model to `folder` as `<kind>-<name>.safetensors`, in float16, with what it says
    of its training.

    Args:
        kind: `"adapter"`, `"preset"`, or `"baseline"` for a rival's weights, which `actvar evaluate` alone uses.
    """
    _, var = _dense(folder)
    load_adapter(var, adapter)
    var.half()
    shipped = folder / f"{kind}-{name}.safetensors"
    save_adapter(var, shipped, describe_adapter(adapter)["training"])
    _halve_factors(shipped)
    save_checksums(folder)


def _halve_factors(adapter: Path) -> None:
    """Write the low-rank factors of an adapter, which no conversion of the model reaches, in float16 as well."""
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(adapter).items()
    }
    with replacing(adapter) as temporary:
        save_file(tensors, temporary, metadata)


def _of_steps(how: Distillation, steps: int, seed: int, source: Source) -> Distillation:
    return replace(how, epochs=steps / (len(source.conditions) // how.batch), seed=seed)


def _dense(folder: Path) -> tuple[VQVAE, VAR]:
    return load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
