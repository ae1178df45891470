"""Train the presets: `near` without guidance in the last two scales, `fast` without it from the second scale on.

Guidance has the strength 0 at the first scale, so `fast` needs no unconditional row at all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actvar.config import DENSE
from actvar.distill.data import sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import Distillation, distill
from actvar.models.checkpoint import load_var
from actvar.zoo.checksums import checked

SAMPLES = 3072
HOW = Distillation(2, CONDITIONAL, epochs=3, batch=32, lr=5e-4)
CONFIGS = {
    "near": replace(DENSE, guidance_until=-2, weights_from=-2),
    "fast": replace(DENSE, guidance_until=1, weights_from=1),
}
STARTS = {"near": None, "fast": "near"}
"""The preset with whose weights each training begins; None for the dense model's."""


def train_preset(name: str, folder: Path, work: Path, seed: int) -> Path:
    """Train a preset of the exported model in `folder`, and return its file in `work`; resumes like `distill`.

    Args:
        name: a key of `CONFIGS`.
        folder: of `var` and `vae` `.safetensors`.
        work: folder of checkpoints and token maps.
        seed: of token maps and training.
    """
    before = STARTS[name]
    start = None if before is None else train_preset(before, folder, work, seed)
    _, var = load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
    source = sampled_source(var, SAMPLES, seed)
    return distill(var, CONFIGS[name], start, source, replace(HOW, seed=seed), work / f"preset-{name}.safetensors")
