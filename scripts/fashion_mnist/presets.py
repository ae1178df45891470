"""Train the presets: `near` without guidance in the last two scales, `fast` and `fastest` from the second scale on.

Guidance has the strength 0 at the first scale, so the two need no unconditional row at all. `fastest` has half of the
FFN's hidden units in the last three scales as well, the same ones for every token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actvar.calibrate.calibration import patch_with_fits, samples_to_fit
from actvar.config import DENSE, ActVARConfig
from actvar.distill.data import GUIDANCE, sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import CALIBRATION_IMAGES, Distillation, distill
from actvar.models.checkpoint import load_var
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import reconfigure, remove_patch
from actvar.zoo.checksums import checked

SAMPLES = 3072
HOW = Distillation(2, CONDITIONAL, epochs=3, batch=32, lr=5e-4)
LOW_RANK = replace(HOW, lr=None, lora=32)
"""For sparse presets, whose files would take too much room otherwise."""
CONFIGS = {
    "near": replace(DENSE, guidance_until=-2, weights_from=-2),
    "fast": replace(DENSE, guidance_until=1, weights_from=1),
    "fastest": ActVARConfig(
        scales=(-3, -2, -1),
        token_rates=(1.0, 1.0, 1.0),
        ffn_rate=0.5,
        static_experts=True,
        guidance_until=1,
        weights_from=1,
    ),
}
STARTS = {"near": None, "fast": "near", "fastest": None}
"""The preset with whose weights each training begins; None for the dense model's."""


def train_preset(name: str, folder: Path, work: Path, seed: int) -> Path:
    """Train a preset of the exported model in `folder`, and return its file in `work`; resumes like `distill`.

    Args:
        name: a key of `CONFIGS`.
        folder: of `var` and `vae` `.safetensors`.
        work: folder of checkpoints and token maps.
        seed: of token maps and training.
    """
    config, before, how = CONFIGS[name], STARTS[name], replace(HOW, seed=seed)
    start = None if before is None else train_preset(before, folder, work, seed)
    _, var = load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
    if config.is_sparse:
        start, how = work / f"order-{name}.safetensors", replace(LOW_RANK, seed=seed)
        samples = samples_to_fit(var, CALIBRATION_IMAGES, seed, GUIDANCE)
        patch_with_fits(var, replace(config, weights_from=None), None, samples)  # no weights are changed yet
        reconfigure(var, config)
        save_adapter(var, start)
        remove_patch(var)
    source = sampled_source(var, SAMPLES, seed)
    return distill(var, config, start, source, how, work / f"preset-{name}.safetensors")
