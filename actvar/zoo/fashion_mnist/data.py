"""Fashion-MNIST from its four idx files, padded to 32x32."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MOST_BYTES = 2**30
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
WHERE_FROM = (
    "install the Debian package dataset-fashion-mnist, or put the four idx files of Fashion-MNIST "
    "(https://github.com/zalandoresearch/fashion-mnist, data/fashion) into a folder and pass it by --data"
)


def read_idx(path: Path) -> torch.Tensor:
    """Return the contents of an idx file, plain or gzipped, as a uint8 tensor of the shape in its header.

    Raises:
        ValueError: not a uint8 idx file, fewer or more bytes than the header promises, or more than `MOST_BYTES`.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\x00\x00\x08":
                raise ValueError(
                    f"{path}: expected an idx file of unsigned bytes, got one that starts with {start.hex()}"
                )
            sizes = file.read(4 * start[3])
            if len(sizes) < 4 * start[3]:
                raise ValueError(f"{path}: expected {start[3]} sizes in the header, the file ends before")
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
            promised = math.prod(shape)
            if promised > MOST_BYTES:
                raise ValueError(f"{path}: expected at most {MOST_BYTES} bytes, the header promises shape {shape}")
            data = np.frombuffer(file.read(promised + 1), np.uint8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a complete gzip file: {error}") from error
    if data.size != promised:
        holds = f"{data.size} bytes" if data.size < promised else "more bytes"
        raise ValueError(f"{path}: the header promises shape {shape}, the file holds {holds}")
    return torch.from_numpy(data.copy()).view(shape)


def load_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `[N, 1, 32, 32]` float32 in [0, 1] and labels `[N]` int64.

    Args:
        folder: of the four files.
        split: "train" or "t10k".

    Raises:
        FileNotFoundError: the folder lacks a file; tells how to get the data.
        ValueError: a file that is damaged, or not of 28x28 images or of as many labels of ten classes.
    """
    images, labels = read_idx(_file(folder, split, "images-idx3")), load_labels(folder, split)
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: expected images [N, 28, 28] and labels [N] of {split!r}, got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    return F.pad(images.unsqueeze(1).float().div_(255), (2, 2, 2, 2)), labels


def load_labels(folder: Path, split: str) -> torch.Tensor:
    """Return the labels `[N]` int64 alone, with the arguments and errors of `load_split`."""
    labels = read_idx(_file(folder, split, "labels-idx1"))
    if labels.ndim != 1:
        raise ValueError(f"{folder}: expected labels [N] of {split!r}, got {list(labels.shape)}")
    if labels.numel() and labels.max() >= len(CLASSES):
        raise ValueError(f"{folder}: expected labels from 0 to {len(CLASSES) - 1}, got {labels.max()}")
    return labels.long()


def _file(folder: Path, split: str, kind: str) -> Path:
    candidates = [folder / f"{split}-{kind}-ubyte{suffix}" for suffix in ("", ".gz")]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{candidates[0]}[.gz] not found; {WHERE_FROM}")
    return path
