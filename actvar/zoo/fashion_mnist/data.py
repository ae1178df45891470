"""Fashion-MNIST from its four idx files, padded to 32x32."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: Path) -> torch.Tensor:
    """A uint8 idx file, plain or gzipped, as a tensor of the shape its header gives.

    Raises:
        ValueError: not a uint8 idx file, or fewer or more bytes than the header promises.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: expected an idx file of unsigned bytes, got one that starts with {content[:4].hex()}"
        )
    dims = content[3]
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=dims, offset=4))
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if data.size != math.prod(shape):
        raise ValueError(f"{path}: the header promises shape {shape}, the file holds {data.size} bytes")
    return torch.from_numpy(data.copy()).view(shape)


def load_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[N, 1, 32, 32]` float32 in [0, 1] and labels `[N]` int64 of `split` "train" or "t10k".

    Raises:
        FileNotFoundError: the folder lacks a file; says where the data comes from.
    """
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        candidates = [folder / f"{split}-{kind}-ubyte{suffix}" for suffix in ("", ".gz")]
        path = next((p for p in candidates if p.exists()), None)
        if path is None:
            raise FileNotFoundError(
                f"{candidates[0]}[.gz] not found; install the Debian package dataset-fashion-mnist or pass --data with "
                "the folder of the four idx files"
            )
        found.append(read_idx(path))
    images, labels = found
    return F.pad(images.unsqueeze(1).float().div_(255), (2, 2, 2, 2)), labels.long()
