"""Measure how far ActVAR moves the bundled model's predictions, for adapters with and without training.

    python -m benchmarks.calibration

KL to the dense logits at the last two scales on token maps of test images: with tokens and experts left out, with
tokens alone, and with experts alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

import actvar
from actvar import ActVARConfig
from actvar.calibrate import calibrate
from actvar.calibrate.rates import blocks_flops
from actvar.config import DENSE
from actvar.evaluate.divergence import divergence_by_scale
from actvar.families import family_of
from actvar.patching.patch import patch_silently
from actvar.sparse.schedule import build_schedule
from actvar.zoo.fashion_mnist.data import DEBIAN_FOLDER, load_split
from actvar.zoo.pretrained import adapter_path

BATCH = 100
ALONE = {"both": {}, "tokens": {"ffn_rate": 1.0}, "experts": {"token_rates": (1.0, 1.0)}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--test-images", type=int, default=500, help="test images (default 500)")
    parser.add_argument("--images", type=int, default=64, help="samples that are fitted to (default 64)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the samples (default 0)")
    options = parser.parse_args()

    vae, var = actvar.load_pretrained("fashion-mnist")
    images, labels = load_split(options.data, "t10k")
    parts = zip(images[: options.test_images].split(BATCH), labels[: options.test_images].split(BATCH), strict=True)
    batches = [(of, vae.quantize.teacher_input(vae.img_to_idxBl(image * 2 - 1))) for image, of in parts]

    def untrained(var: nn.Module) -> None:
        patch_silently(var, ActVARConfig())

    def stage1(var: nn.Module) -> None:
        patch_silently(var, ActVARConfig())
        actvar.load_adapter(var, adapter_path("fashion-mnist", "paper-stage1"))

    def fitted(**arguments) -> Callable[[nn.Module], None]:
        return lambda var: calibrate(var, images=options.images, **arguments)

    rows = {"untrained": untrained, "stage 1": stage1}
    for seed in options.seeds:
        rows |= {
            f"calibrate, contiguous, uniform, seed {seed}": fitted(seed=seed, uniform=True, cluster=False),
            f"calibrate, clustered, uniform, seed {seed}": fitted(seed=seed, uniform=True),
            f"calibrate, contiguous, seed {seed}": fitted(seed=seed, cluster=False),
            f"calibrate, seed {seed}": fitted(seed=seed),
        }
    sides = [var.patch_nums[scale] for scale in ActVARConfig().scales]
    titles = [f"{alone} {side}x{side}" for alone in ALONE for side in sides]
    print(f"{'':<42}{'FLOPs saved':>12}" + "".join(f"{title:>13}" for title in titles))
    for name, prepare in rows.items():
        prepare(var)
        saved = 1 - blocks_flops(var, var.actvar.config, batches[0][0]) / blocks_flops(var, DENSE, batches[0][0])
        found = [kl for changes in ALONE.values() for kl in _divergence(var, changes, batches)]
        print(f"{name:<42}{saved:>12.1%}" + "".join(f"{kl:>13.3f}" for kl in found), flush=True)


def _divergence(var: nn.Module, changes: dict[str, object], batches: list) -> list[float]:
    """Return the divergence of the active scales, with some rates changed."""
    config = var.actvar.config
    schedules = [block.actvar.schedule for block in var.blocks]
    for index, block in enumerate(var.blocks):
        block.actvar.schedule = build_schedule(replace(config, **changes), family_of(var).maps(var), index)
    found = divergence_by_scale(var, batches)
    for block, schedule in zip(var.blocks, schedules, strict=True):
        block.actvar.schedule = schedule
    return [found[scale] for scale in config.scales]


if __name__ == "__main__":
    main()
