"""One image file as pixels, either read correctly or refused by an error that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read, whatever the file's name. For some other formats Pillow would run other programs."""
EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of Pillow whose values have a known range. The values of its other modes, `I` and `F`, have none."""
MARGIN = 1.125
"""Ratio of a resized image's shorter side to the square that is cut from its centre, taken from the public code."""
TURNS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
"""The turn that brings an image upright, by EXIF orientation; orientation 1 is upright."""


def load_image(path: Path, side: int, channels: int) -> torch.Tensor:
    """Return the pixels of an image file, turned as its EXIF orientation says, and cut to a square.

    The shorter side becomes 1.125 times `side`, by Lanczos, and the centre is cut out. Transparent pixels are laid on
    white, 16 bits are scaled to 8, and a file with several frames gives its first one.

    Args:
        path: the file.
        side: pixels of the square's side.
        channels: 1 (grey) or 3.

    Returns:
        `[channels, side, side]` float32 in [0, 1].

    Raises:
        ValueError: a file that is no image, is damaged, or is of a mode without a known range; names the file.
        ValueError: more pixels than Pillow's `Image.MAX_IMAGE_PIXELS`, before or after the image is resized.
    """
    with _opened(path, side) as file:
        image = flattened(file, channels)
        turn = TURNS.get(_orientation(file))
        image = image if turn is None else image.transpose(turn)
        width, height = _resized(image.size, side)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).view(side, side, channels).permute(2, 0, 1)


def check_image(path: Path, side: int, channels: int) -> None:
    """Decode an image file like `load_image`, but a JPEG at an eighth of its size, which is faster.

    Args:
        path: the file.
        side: pixels of the square's side.
        channels: 1 (grey) or 3.

    Raises:
        ValueError: a file that `load_image` cannot read; names the file.
    """
    with _opened(path, side) as image:
        image.draft(None, (1, 1))
        flattened(image, channels)


def flattened(image: Image.Image, channels: int) -> Image.Image:
    """Return an image in 8 bits without transparency, in Pillow's mode `L` for 1 channel, otherwise `RGB`.

    Args:
        image: of one of the modes `EIGHT_BITS` and `SIXTEEN_BITS`, or a PNG of mode `I`. Transparent pixels are laid on
            white, and 16 bits are scaled.
        channels: 1 (grey) or 3.
    """
    mode = "L" if channels == 1 else "RGB"
    image.load()  # only now may `info` have a transparent colour
    if image.mode not in EIGHT_BITS:
        values = np.asarray(image).astype(np.float32)
        values[values == image.info.get("transparency")] = 65535
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert(mode)
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB").convert(mode) if image.mode in ("LAB", "HSV") else image.convert(mode)


@contextmanager
def _opened(path: Path, side: int) -> Iterator[Image.Image]:
    """Open an image file for a square of `side` pixels.

    An error while the context is open becomes one that names the file.
    """
    try:
        if not path.is_file():
            raise ValueError("it is a folder, a device or a pipe" if path.exists() else "there is no such file")
        with Image.open(path, formats=FORMATS) as image:
            _expect_readable(image, side)
            yield image
    except Exception as error:  # decoders raise many kinds, and so do warnings that are errors
        reason = str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise ValueError(f"{path}: expected an image: {reason}") from error


def _expect_readable(image: Image.Image, side: int) -> None:
    most = Image.MAX_IMAGE_PIXELS
    for width, height in (image.size, _resized(image.size, side)):
        if most is not None and width * height > most:
            size = f"{image.width} x {image.height}"
            raise ValueError(
                f"its size {size} takes {width * height} pixels, of which {most} are read; make it smaller"
            )
    is_old_pillows = image.mode == "I" and image.format == "PNG"  # old Pillows read 16 bits as mode I
    if image.mode not in EIGHT_BITS + SIXTEEN_BITS and not is_old_pillows:
        raise ValueError(f"Pillow's mode {image.mode} has no known range of values; save it with 8 or 16 bits")


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size of an image whose shorter side has become `MARGIN` times `side`."""
    shorter = round(side * MARGIN)
    factor = shorter / min(size)
    width, height = (max(shorter, round(length * factor)) for length in size)
    return width, height


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 where EXIF is missing or damaged."""
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1
