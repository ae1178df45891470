"""Results as PNG files: grids of images, differences, and which tokens each block updated."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from matplotlib.figure import Figure
from PIL import Image

from actvar.sparse.state import BlockRecord
from actvar.utils.files import replacing

GAP = 2
UPDATED_COLOUR = np.array([1.0, 0.55, 0.1])
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """uint8, like `images` in shape: values of [0, 1] as 0 ... 255, rounded."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def save_grid(images: torch.Tensor, path: Path, columns: int) -> Path:
    """Write images `[B, C, H, W]` in [0, 1] (C 1 or 3) as one PNG, row by row, enlarged to 64 pixels a side or more."""
    factor = max(1, -(-64 // images.shape[-1]))
    pixels = repeat(
        pixel_values(images).cpu().expand(-1, 3, -1, -1), "b c h w -> b (h down) (w right) c", down=factor, right=factor
    )
    _, height, width, _ = pixels.shape
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels.numpy()):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    with replacing(path) as temporary:
        Image.fromarray(canvas).save(temporary, format="PNG")
    return path


def save_token_overlay(images: torch.Tensor, records: Sequence[BlockRecord], path: Path, titles: Sequence[str]) -> Path:
    """For each image a row per active scale: the image, one panel per block with its updated tokens in colour, and one
    with the number of blocks that updated each token, and the share of tokens that any did.

    Args:
        images: `[n, C, H, W]` in [0, 1], the first n of the sampled batch.
        records: of one sampling run (`actvar.record`); only conditional rows are shown.
        titles: a label per image.
    """
    scales = sorted({r.scale.index for r in records if r.index is not None})
    if not scales:
        raise ValueError("expected records of a run that selects tokens, got none")
    blocks = sorted({r.block for r in records})
    kept = {(r.block, r.scale.index): r.index for r in records}
    sides = {r.scale.index: math.isqrt(r.scale.tokens) for r in records}
    rows = len(images) * len(scales)
    figure = Figure(figsize=(1.1 * (len(blocks) + 2), 1.3 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(blocks) + 2, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        picture = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        for j, scale in enumerate(scales):
            row = axes[i * len(scales) + j]
            side = sides[scale]
            row[0].imshow(picture)
            row[0].set_title(f"{titles[i]}, {side}x{side}", fontsize=8)
            for axis, block in zip(row[1:-1], blocks, strict=True):
                index = kept.get((block, scale))  # None: the block updates all tokens
                axis.imshow(
                    _tinted(picture, torch.arange(side * side, device="cpu") if index is None else index[i], side)
                )
                if i == 0 and j == 0:
                    axis.set_title(f"block {block + 1}", fontsize=8)
            times = times_updated([r.only([i]) for r in records if r.scale.index == scale])[0].view(side, side).numpy()
            row[-1].imshow(times, cmap="cividis", vmin=0, vmax=len(blocks))
            row[-1].set_title(f"covered: {(times > 0).mean():.0%}", fontsize=8)
            for (y, x), count in np.ndenumerate(times if side <= 10 else times[:0]):
                colour = "black" if count > len(blocks) / 2 else "white"
                row[-1].text(x, y, count, ha="center", va="center", fontsize=5, color=colour)
    return save_figure(figure, path)


def times_updated(records: Sequence[BlockRecord]) -> torch.Tensor:
    """How many of these records, of one scale, updated each token, `[R, L]` int64."""
    scale, rows = records[0].scale, len(records[0].u)
    times = torch.zeros(rows, scale.tokens, dtype=torch.int64, device="cpu")
    for of_block in records:
        if of_block.index is None:
            times += 1
        else:
            times.scatter_add_(1, of_block.index.cpu(), torch.ones_like(of_block.index, device="cpu"))
    return times


def _tinted(picture: np.ndarray, index: torch.Tensor, side: int) -> np.ndarray:
    """`picture` `[H, W, 3]` with the tokens `index` of a `side` x `side` map tinted."""
    updated = torch.zeros(side * side, dtype=torch.bool, device="cpu")
    updated[index.cpu()] = True
    height, width, _ = picture.shape
    rows = np.arange(height) * side // height
    columns = np.arange(width) * side // width
    mask = updated.view(side, side).numpy()[rows[:, None], columns[None, :], None]
    return np.where(mask, 0.55 * picture + 0.45 * UPDATED_COLOUR, picture).clip(0, 1)


def save_loss_plot(log: Path, path: Path) -> Path:
    """Plot the losses of a training's CSV over its steps, one panel per loss.

    Args:
        log: columns `step` and one per loss, as `actvar.training.loop.fit` writes it.
    """
    names = log.read_text().splitlines()[0].split(",")[1:]
    columns = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2).T
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    for axis, name, values in zip(figure.subplots(1, len(names), squeeze=False)[0], names, columns[1:], strict=True):
        axis.plot(columns[0], values, linewidth=1)
        axis.set(title=name, xlabel="step")
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def save_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    return path
