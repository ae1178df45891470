"""Train the presets: `near` without guidance in the last two scales, `fast` without it from the second scale on.

Guidance has the strength 0 at the first scale, so `fast` needs no unconditional row at all. `fastest` is `fast` with a
quarter of the FFN's hidden units, the same for every token, in the last three scales.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from actvar.baselines.static_pruning import fix_experts, wanda_units
from actvar.config import DENSE, ActVARConfig
from actvar.distill.data import sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import Distillation, distill
from actvar.families import family_of
from actvar.models import VAR
from actvar.models.checkpoint import load_var
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import patched_silently
from actvar.utils.weight_override import replace_parameters, tuned_parameters
from actvar.zoo.checksums import checked
from actvar_kernels.cpu_backend import cpu

_LONG = Distillation(2, CONDITIONAL, epochs=2.5, batch=32, lr=5e-4, bf16=cpu.multiplies_bfloat16())
SAMPLES = {"near": 12288, "fast": 3072, "fastest": 3072}
HOW = {"near": _LONG, "fast": replace(_LONG, epochs=3, bf16=False), "fastest": replace(_LONG, epochs=4)}
CONFIGS = {
    "near": replace(DENSE, guidance_until=-2, weights_from=-2),
    "fast": replace(DENSE, guidance_until=1, weights_from=1),
    "fastest": ActVARConfig(
        scales=(-3, -2, -1),
        token_rates=(1.0, 1.0, 1.0),
        ffn_rate=0.25,
        static_experts=True,
        guidance_until=1,
        weights_from=1,
    ),
}
STARTS = {"near": None, "fast": "near", "fastest": "fast"}
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
    return train_from(start, name, folder, work, seed)


def train_from(start: Path | None, name: str, folder: Path, work: Path, seed: int) -> Path:
    """Train a preset from the file `start`, or from the dense model; arguments and result as in `train_preset`."""
    vae, var = load_var(checked(folder / "var.safetensors"), checked(folder / "vae.safetensors"))
    if CONFIGS[name].static_experts and start is not None:
        start = _in_static_order(var, CONFIGS[name], start, work / f"preset-{name}-start.safetensors")
    source = sampled_source(var, SAMPLES[name], seed)
    how = replace(HOW[name], seed=seed)
    return distill(vae, var, CONFIGS[name], start, source, how, work / f"preset-{name}.safetensors")


def _in_static_order(var: VAR, config: ActVARConfig, start: Path, out: Path) -> Path:
    """Write the adapter `start` to `out` with each block's hidden units in the order of their Wanda scores."""
    orders = wanda_units(var, 1.0, config.scales)
    family = family_of(var)
    with patched_silently(var, None, start):
        weights = {name: weight.detach().clone() for name, weight in tuned_parameters(var).items()}
    for index, order in enumerate(orders):
        for leaf, axis in family.hidden_axes.items():
            name = f"blocks.{index}.{leaf}"
            weights[name] = weights[name].index_select(axis, order)
    with patched_silently(var, config, None):
        fix_experts(var, orders)
        replace_parameters(var, {name: nn.Parameter(weight, False) for name, weight in weights.items()})
        save_adapter(var, out)
    return out
