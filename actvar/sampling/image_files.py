"""Keep the images of a batch in files: one shard of safetensors, or a PNG for each image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from actvar.utils.files import replacing
from actvar.utils.pictures import as_picture


class Batch(NamedTuple):
    """Name the images of a batch.

    Args:
        number: of the batch.
        images: numbers of its images, among those of all batches.
        labels: class of each image.
    """

    number: int
    images: range
    labels: tuple[int, ...]


class ImageFiles(Protocol):
    """Write and read the images of batches in one kind of file."""

    name: str
    pattern: str
    """Pattern of the names of the files, which may lie in folders."""

    def write(self, folder: Path, batch: Batch, pixels: np.ndarray) -> None:
        """Write `pixels` `[b, H, W, C]` uint8, each file complete or not there."""
        ...

    def is_complete(self, folder: Path, batch: Batch) -> bool:
        """Return whether all files of a batch can be read and have its labels."""
        ...

    def read(self, folder: Path, batch: Batch, row: int) -> np.ndarray:
        """Return the image in a row of a batch, `[H, W, C]` uint8, without reading the others."""
        ...


class Shards:
    """Keep a batch as `shard-<number>.safetensors`, with `images` `[b, H, W, C]` uint8 and `labels` `[b]` int64."""

    name, pattern = "safetensors", "shard-*.safetensors"

    def write(self, folder: Path, batch: Batch, pixels: np.ndarray) -> None:
        """Write the file of a batch."""
        with replacing(self._path(folder, batch)) as temporary:
            save_file({"images": pixels, "labels": np.array(batch.labels)}, temporary)

    def is_complete(self, folder: Path, batch: Batch) -> bool:
        """Return whether the file of a batch can be read and has its labels."""
        try:
            with safe_open(self._path(folder, batch), "np") as file:
                shape = file.get_slice("images").get_shape()
                return shape[0] == len(batch.labels) and file.get_tensor("labels").tolist() == list(batch.labels)
        except (OSError, SafetensorError):
            return False

    def read(self, folder: Path, batch: Batch, row: int) -> np.ndarray:
        """Return the image in a row of a batch, `[H, W, C]` uint8."""
        with safe_open(self._path(folder, batch), "np") as file:
            return file.get_slice("images")[row]

    def _path(self, folder: Path, batch: Batch) -> Path:
        return folder / f"shard-{batch.number:05d}.safetensors"


class PNGs:
    """Keep image number `i` as `<i>.png`, grey or RGB, with its class as the text `label`."""

    name, pattern = "png", "[0-9]*.png"

    def write(self, folder: Path, batch: Batch, pixels: np.ndarray) -> None:
        """Write the files of a batch."""
        for image, label, values in zip(batch.images, batch.labels, pixels, strict=True):
            facts = PngInfo()
            facts.add_text("label", str(label))
            with replacing(self._path(folder, image)) as temporary:
                as_picture(values).save(temporary, format="PNG", pnginfo=facts)

    def is_complete(self, folder: Path, batch: Batch) -> bool:
        """Return whether all files of a batch can be read and have its labels."""
        return all(
            self._has_label(self._path(folder, image), label)
            for image, label in zip(batch.images, batch.labels, strict=True)
        )

    def read(self, folder: Path, batch: Batch, row: int) -> np.ndarray:
        """Return the image in a row of a batch, `[H, W, C]` uint8."""
        with Image.open(self._path(folder, batch.images[row]), formats=["PNG"]) as picture:
            pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _has_label(self, path: Path, label: int) -> bool:
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                found = picture.info.get("label")
                picture.verify()  # the checksums of all parts
        except (OSError, SyntaxError):  # Pillow raises a SyntaxError for a damaged PNG
            return False
        return found == str(label)

    def _path(self, folder: Path, image: int) -> Path:
        return folder / f"{image:05d}.png"


IMAGE_FILES: dict[str, ImageFiles] = {files.name: files for files in (Shards(), PNGs())}
"""The kinds of files, by the name of a format."""
