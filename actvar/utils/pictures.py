"""Write results as PNG and CSV files: grids of images, figures and tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from einops import repeat
from PIL import Image

from actvar.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 2
"""Pixels between the images of a grid."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
"""Colours of Okabe and Ito, which colour-blind readers tell apart."""


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Return `images` in [0, 1] as uint8 from 0 to 255, rounded, in the same shape."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def as_picture(pixels: np.ndarray) -> Image.Image:
    """Return a picture, grey or RGB, of an array `[H, W, C]` uint8 with 1 or 3 channels."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_images(images: torch.Tensor, folder: Path, name: str, columns: int, single: bool) -> list[Path]:
    """Write images as the grid `<name>.png`, or each in its own size as `<name>-<number>.png`, and return the files.

    Args:
        images: `[B, C, H, W]` in [0, 1], where C is 1 or 3.
        folder: the folder to write to.
        name: what the names of the files begin with.
        columns: images in a row of the grid.
        single: whether each image is a file of its own.
    """
    if not single:
        return [save_grid(images, folder / f"{name}.png", columns)]
    written = []
    for number, pixels in enumerate(pixel_values(images).permute(0, 2, 3, 1).cpu().numpy()):
        path = folder / f"{name}-{number:05d}.png"
        with replacing(path) as temporary:
            as_picture(pixels).save(temporary, format="PNG")
        written.append(path)
    return written


def as_grid(images: torch.Tensor, columns: int, least: int = 64) -> Image.Image:
    """Return images as one picture, row by row, each enlarged until it has so many pixels a side.

    Args:
        images: `[B, C, H, W]` in [0, 1], where C is 1 or 3.
        columns: images in a row.
        least: pixels of the shorter side of an image; larger ones stay as they are.
    """
    factor = max(1, -(-least // min(images.shape[-2:])))
    pixels = repeat(
        pixel_values(images).cpu().expand(-1, 3, -1, -1), "b c h w -> b (h down) (w right) c", down=factor, right=factor
    )
    _, height, width, _ = pixels.shape
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels.numpy()):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_grid(images: torch.Tensor, path: Path, columns: int) -> Path:
    """Write the PNG of `as_grid`, and return `path`."""
    with replacing(path) as temporary:
        as_grid(images, columns).save(temporary, format="PNG")
    return path


def save_loss_plot(log: Path, path: Path) -> Path:
    """Plot the losses of a training's CSV over its steps as a PNG, one panel per loss, and return `path`.

    Args:
        log: a CSV file of `actvar.training.loop.fit`, with a column `step` and one per loss.
        path: the file to write.
    """
    names = log.read_text().splitlines()[0].split(",")[1:]
    columns = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2).T
    figure = new_figure(3.2 * len(names), 2.6)
    for axis, name, values in zip(figure.subplots(1, len(names), squeeze=False)[0], names, columns[1:], strict=True):
        axis.plot(columns[0], values, linewidth=1)
        axis.set(title=name, xlabel="step")
    return save_figure(figure, path)


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure of so many inches, with a layout of matplotlib or none.

    Matplotlib is imported here alone, since that takes a third of a second and few commands draw a figure.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return `path`."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def save_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV file of a header and rows, and return `path`."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return path
