"""Figures 7 and 8: the same images drawn dense and with ActVAR, by models of two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure

from actvar.flops import model_flops, total_flops
from actvar.sampling.request import Sampling
from actvar.utils.pictures import pixel_values, save_figure, save_table
from actvar.zoo import load_feature_network, load_pretrained
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.pretrained import WEIGHTS, bundled_adapters

MODELS = ("fashion-mnist", "fashion-mnist-small")


def figures7and8(folder: Path, models: Sequence[str] = MODELS, per_class: int = 6) -> list[Path]:
    """Write `figure7.png` and `.csv` of the first model, `figure8.png` and `.csv` of the second, and so on.

    A model that does not come with the package is left out. The tables have `model, adapter, class, image, drawn_as,
    difference`. The feature network sees the class `drawn_as`. The `difference` is the mean absolute one to the dense
    image in [0, 1].

    Args:
        folder: of the files.
        models: their names.
        per_class: images drawn of each class.

    Returns:
        The files.
    """
    written = []
    for number, model in enumerate(models, 7):
        if model in WEIGHTS:
            written += _side_by_side(model, folder / f"figure{number}.png", per_class)
    return written


@torch.no_grad()
def _side_by_side(model: str, path: Path, per_class: int) -> list[Path]:
    sampling = Sampling(tuple(label for label in range(len(CLASSES)) for _ in range(per_class)))
    network = load_feature_network()
    drawn, titles, rows = [], [], []
    for adapter in (None, *bundled_adapters(model)):
        _, var = load_pretrained(model, adapter)
        images = sampling.run(var)
        flops = total_flops(model_flops(var, 1))
        if adapter is None:
            dense, dense_flops = images, flops
        drawn.append(_sheet(images, per_class))
        saved = f"ActVAR, {adapter}: {1 - flops / dense_flops:.1%} of FLOPs saved"
        titles.append("dense" if adapter is None else saved)
        seen = network.logits(images).argmax(dim=1).tolist()
        difference = (images - dense).abs().mean(dim=(1, 2, 3)).tolist()
        rows += [
            (model, adapter or "dense", CLASSES[label], place % per_class + 1, CLASSES[drawn_as], f"{change:.4f}")
            for place, (label, drawn_as, change) in enumerate(zip(sampling.labels, seen, difference, strict=True))
        ]
    columns = ("model", "adapter", "class", "image", "drawn_as", "difference")
    return [
        save_figure(_drawn(model, drawn, titles), path),
        save_table(path.with_suffix(".csv"), columns, rows),
    ]


def _sheet(images: torch.Tensor, per_class: int) -> np.ndarray:
    """Return one picture, uint8 with a row per class, of images `[B, 1, H, W]` in [0, 1]."""
    framed = torch.nn.functional.pad(pixel_values(images), (1, 1, 1, 1), value=255)
    return rearrange(framed, "(rows columns) 1 h w -> (rows h) (columns w)", columns=per_class).numpy()


def _drawn(model: str, sheets: Sequence[np.ndarray], titles: Sequence[str]) -> Figure:
    height, width = sheets[0].shape
    inches = 7.5 * width / height
    figure = Figure(figsize=(inches * len(sheets) + 1.2, 8.2), layout="constrained")
    all_axes = figure.subplots(1, len(sheets), squeeze=False)[0]
    for axes, sheet, title in zip(all_axes, sheets, titles, strict=True):
        axes.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    side = height / len(CLASSES)
    all_axes[0].set_yticks([side * (place + 0.5) for place in range(len(CLASSES))], CLASSES, fontsize=9)
    all_axes[0].tick_params(length=0)
    figure.suptitle(f"{model}: the same seeds, dense and with ActVAR", fontsize=11)
    return figure
