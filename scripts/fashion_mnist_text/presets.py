"""Train the presets: `near` without guidance in the last two scales, `fast` in the last three, with low-rank changes.

The conditional rows learn the guided logits of the dense model there. `fast` leaves out a quarter of the experts too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from actvar.calibrate import calibrate
from actvar.config import DENSE, ActVARConfig
from actvar.distill.data import sampled_source
from actvar.distill.recipes import CONDITIONAL
from actvar.distill.run import Distillation, distill
from actvar.families.conditions import Texts
from actvar.models.checkpoint import load_infinity
from actvar.patching.adapter import describe_adapter, save_adapter
from actvar.patching.patch import load_adapter, reconfigure, remove_patch
from actvar.zoo.checksums import checked, save_checksums
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE
from actvar.zoo.fashion_mnist_text.prompts import PROMPTS
from actvar.zoo.pretrained import load_text_encoder

SAMPLES, RANK = 3072, 16
HOW = Distillation(2, CONDITIONAL, epochs=3, batch=32, lr=2e-3, lora=RANK, cfg=DRAW["cfg"])
CONFIGS = {
    "near": replace(DENSE, guidance_until=-2, weights_from=-2),
    "fast": ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=0.75, guidance_until=-3, weights_from=-3),
}


def train_preset(name: str, folder: Path, work: Path, seed: int = 0) -> Path:
    """Train a preset of the exported model in `folder`, and return its file in `work`; resumes like `distill`.

    Args:
        name: a key of `CONFIGS`.
        folder: of `infinity` and `tokenizer` `.safetensors`.
        work: folder of checkpoints and token maps.
        seed: of token maps and training.
    """
    config, start = CONFIGS[name], None
    _, infinity = load_infinity(checked(folder / "infinity.safetensors"), checked(folder / "tokenizer.safetensors"))
    features, lengths = load_text_encoder()(PROMPTS)
    texts = Texts(features.split(lengths), SQUARE, DRAW["tau"])
    if config.is_sparse:
        start = work / f"gates-{name}.safetensors"
        chosen = calibrate(infinity, replace(config, weights_from=None), seed=seed, cfg=DRAW["cfg"], texts=texts).config
        config = replace(chosen, weights_from=config.weights_from)
        reconfigure(infinity, config)
        save_adapter(infinity, start)
        remove_patch(infinity)
    source = sampled_source(infinity, SAMPLES, seed, texts, DRAW["cfg"])
    return distill(infinity, config, start, source, replace(HOW, seed=seed), work / f"preset-{name}.safetensors")


def ship(preset: Path, folder: Path) -> None:
    """Write a preset to `folder` in float16, with what it says of its training."""
    _, infinity = load_infinity(checked(folder / "infinity.safetensors"), checked(folder / "tokenizer.safetensors"))
    load_adapter(infinity, preset)
    infinity.half()
    save_adapter(infinity, folder / preset.name, describe_adapter(preset)["training"])
    save_checksums(folder)
