"""Train the presets: `near` without guidance in the last two scales, `fast` in the last three and with fewer tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actvar.calibrate import calibrate
from actvar.config import DENSE, ActVARConfig
from actvar.distill.data import sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import Distillation, distill
from actvar.models.checkpoint import load_var
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import load_adapter, reconfigure, remove_patch
from actvar.utils.weight_override import replace_parameters, tuned_parameters
from actvar.zoo.checksums import checked

SAMPLES = 3072
HOW = Distillation(2, CONDITIONAL, epochs=3, batch=32, lr=5e-4)
CONFIGS = {
    "near": replace(DENSE, guidance_until=-2, weights_from=-2),
    "fast": ActVARConfig(token_rates=(0.75, 0.6), ffn_rate=1.0, guidance_until=-3, weights_from=-3),
}


def train_preset(name: str, folder: Path, work: Path, seed: int) -> Path:
    """Train a preset of the exported model in `folder`, and return its file in `work`; resumes like `distill`.

    Args:
        name: a key of `CONFIGS`.
        folder: of `var` and `vae` `.safetensors`.
        work: folder of checkpoints and token maps.
        seed: of token maps and training.
    """
    vae, var = load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
    config, start = CONFIGS[name], None
    if config.is_sparse:
        start = work / f"{name}-start.safetensors"
        if not start.exists():
            _with_gates(var, config, train_preset("near", folder, work, seed), start)
    source = sampled_source(var, SAMPLES, seed)
    return distill(vae, var, config, start, source, replace(HOW, seed=seed), work / f"preset-{name}.safetensors")


def _with_gates(var, config: ActVARConfig, weights: Path, out: Path) -> None:
    """Write an adapter with calibrated gates and the trained weights of another one; `var` ends unpatched."""
    load_adapter(var, weights)
    trained = tuned_parameters(var)
    remove_patch(var)
    calibrate(var, replace(config, guidance_until=None, weights_from=None), uniform=True, cluster=False)
    replace_parameters(var, trained)
    reconfigure(var, config)
    save_adapter(var, out)
    remove_patch(var)
