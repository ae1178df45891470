"""Draw the same images by several methods, a row for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from actvar.utils.pictures import new_figure, save_figure

WIDTH = 1.6
"""Inches of an image."""


def save_method_sheet(path: Path, rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Path:
    """Write a picture with a row of images for each method.

    Args:
        path: the PNG.
        rows: images `[H, W, C]` uint8 by the method's name, as many in each row as there are titles.
        titles: what the columns show.

    Returns:
        The path.
    """
    height, width, _ = next(iter(rows.values()))[0].shape
    size = (WIDTH * len(titles) + 1.2, WIDTH * height / width * len(rows) + 0.5)
    figure = new_figure(*size)
    all_axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for of_row, (name, images) in zip(all_axes, rows.items(), strict=True):
        for axes, pixels in zip(of_row, images, strict=True):
            axes.imshow(np.broadcast_to(pixels, (height, width, 3)))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        of_row[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    for axes, title in zip(all_axes[0], titles, strict=True):
        axes.set_title(title, fontsize=7)
    return save_figure(figure, path)
