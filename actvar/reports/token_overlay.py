"""A picture of the tokens that each block updated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from actvar.sparse.record import BlockRecord
from actvar.utils.pictures import new_figure, save_figure

UPDATED_COLOUR = np.array([1.0, 0.55, 0.1])
GAP, HEADING, LETTER = 0.1, 0.3, 0.07
"""Inches between panels, above them for a title, and of a letter of a title."""


def save_token_overlay(images: torch.Tensor, records: Sequence[BlockRecord], path: Path, titles: Sequence[str]) -> Path:
    """Write a picture with a row per image and active scale.

    A row has the image, and a panel per block with its updated tokens in colour. The last panel has the number of
    blocks that updated each token, and the share of tokens that any block updated.

    Args:
        images: `[n, C, H, W]` float32 in [0, 1], the first n of the sampled batch.
        records: of one sampling run (`actvar.record`); only conditional rows are shown.
        path: the PNG.
        titles: a label per image.

    Returns:
        The path.

    Raises:
        ValueError: no record has selected tokens.
    """
    scales = sorted({r.scale.index for r in records if r.index is not None})
    if not scales:
        raise ValueError("expected records of a run that selects tokens, got none")
    blocks = sorted({r.block for r in records})
    kept = {(r.block, r.scale.index): r.index for r in records}
    sizes = {r.scale.index: (r.scale.height, r.scale.width) for r in records}
    panel_height = images.shape[-2] / images.shape[-1]  # a panel is one inch wide
    first_width = max([1.0, *(LETTER * len(f"{title}, 00x00") for title in titles)])
    lefts = [GAP, *(2 * GAP + first_width + (1 + GAP) * column for column in range(len(blocks) + 1))]
    row_height = HEADING + panel_height
    figure_size = (lefts[-1] + 1 + GAP, len(images) * len(scales) * row_height + GAP)
    figure = new_figure(*figure_size, layout=None)
    axis = figure.add_axes((0, 0, 1, 1))  # a single one, since each takes longer than all pictures
    axis.set_axis_off()

    def show(panel: np.ndarray, row: int, column: int, title: str = "", **colours: Any) -> None:
        left, top = lefts[column], row * row_height + HEADING
        axis.imshow(panel, extent=(left, left + 1, top + panel_height, top), aspect="auto", **colours)
        axis.text(left, top - 0.05, title, fontsize=8)

    for i, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        picture = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        for j, scale in enumerate(scales):
            row = i * len(scales) + j
            height, width = sizes[scale]
            show(picture, row, 0, f"{titles[i]}, {height}x{width}")
            for column, block in enumerate(blocks, 1):
                index = kept.get((block, scale))  # None: the block updates all tokens
                updated = torch.arange(height * width, device="cpu") if index is None else index[i]
                show(_tinted(picture, updated, height, width), row, column, f"block {block + 1}" if row == 0 else "")
            times = times_updated([r.only([i]) for r in records if r.scale.index == scale])[0]
            times = times.view(height, width).numpy()
            show(times, row, -1, f"covered: {(times > 0).mean():.0%}", cmap="cividis", vmin=0, vmax=len(blocks))
            for (y, x), count in np.ndenumerate(times if max(height, width) <= 10 else times[:0]):
                colour = "black" if count > len(blocks) / 2 else "white"
                down = row * row_height + HEADING + (y + 0.5) / height * panel_height
                right = lefts[-1] + (x + 0.5) / width
                axis.text(right, down, str(count), ha="center", va="center", fontsize=5, color=colour)
    axis.set(xlim=(0, figure_size[0]), ylim=(figure_size[1], 0))
    return save_figure(figure, path)


def tinted_by_updates(images: torch.Tensor, records: Sequence[BlockRecord]) -> torch.Tensor | None:
    """Return images with their tokens tinted, the more the more blocks updated them at the last scale that selects.

    Args:
        images: `[B, C, H, W]` in [0, 1] of one sampling run, where C is 1 or 3.
        records: of the same run (`actvar.record`); only conditional rows are shown.

    Returns:
        `[B, 3, H, W]` float32 in [0, 1], or None where every block updated all tokens.
    """
    selecting = [r for r in records if r.index is not None]
    if not selecting:
        return None
    scale = max((r.scale for r in selecting), key=lambda scale: scale.index)
    rows = list(range(len(images)))
    chosen = [r.only(rows) for r in records if r.scale.index == scale.index]
    share = times_updated(chosen).view(-1, 1, scale.height, scale.width) / len(chosen)
    pictures = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    strength = 0.6 * F.interpolate(share, size=pictures.shape[2:], mode="nearest")
    colour = torch.tensor(UPDATED_COLOUR, dtype=torch.float32).view(1, 3, 1, 1)
    return (1 - strength) * pictures + strength * colour


def times_updated(records: Sequence[BlockRecord]) -> torch.Tensor:
    """Return how many of these records, all at one scale, updated each token, `[R, L]` int64."""
    scale, rows = records[0].scale, len(records[0].u)
    times = torch.zeros(rows, scale.tokens, dtype=torch.int64, device="cpu")
    for record in records:
        if record.index is None:
            times += 1
        else:
            times.scatter_add_(1, record.index.cpu(), torch.ones_like(record.index, device="cpu"))
    return times


def _tinted(picture: np.ndarray, index: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Return the picture with some tokens of a map tinted.

    Args:
        picture: `[H, W, 3]` float32 in [0, 1].
        index: tokens, `[K]` int64.
        height, width: of the map.
    """
    updated = torch.zeros(height * width, dtype=torch.bool, device="cpu")
    updated[index.cpu()] = True
    picture_height, picture_width, _ = picture.shape
    rows = np.arange(picture_height) * height // picture_height
    columns = np.arange(picture_width) * width // picture_width
    mask = updated.view(height, width).numpy()[rows[:, None], columns[None, :], None]
    return np.where(mask, 0.55 * picture + 0.45 * UPDATED_COLOUR, picture).clip(0, 1)
