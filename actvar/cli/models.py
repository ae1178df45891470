"""List the bundled models, by `actvar models`."""

from __future__ import annotations

import argparse
import json

from actvar.models.checkpoint import describe_checkpoint
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.pretrained import TEXT_MODEL, WEIGHTS, bundled_adapters, bundled_presets, checkpoints, load_text_encoder


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `models` to its parser."""
    command.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> None:
    """Print each model with its size, its classes or words, its presets and its adapters."""
    found = {name: _facts(name) for name in WEIGHTS}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, facts in found.items():
        print(name)
        for fact, value in facts.items():
            print(f"  {fact + ':':<10} {', '.join(value) if isinstance(value, list) else value}")


def _facts(name: str) -> dict[str, object]:
    """Return what there is of a bundled model, JSON-compatible."""
    described = describe_checkpoint(checkpoints(name)[0])
    if name == TEXT_MODEL:
        size = f"{described['depth']} blocks, width {described['embed_dim']}, {described['token_bits']} bits a token"
        draws = {"words": list(load_text_encoder().vocabulary)}
    else:
        size = f"{described['depth']} blocks, width {described['width']}, {described['num_classes']} classes"
        draws = {"classes": list(CLASSES)}
    return {
        "size": size,
        **draws,
        "presets": bundled_presets(name),
        "adapters": bundled_adapters(name),
    }
