"""Image files are read right or refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from actvar.distill.images import EIGHT_BITS, SIXTEEN_BITS, TURNS, check_image, flattened, load_image

COLOUR = (200, 100, 50)
GREY = 124
"""Hold the grey value of COLOUR, by the weights of ITU-R 601."""


def ramp(width: int = 40, height: int = 30) -> np.ndarray:
    """Return `[height, width, 3]` uint8 that is different at every corner and in every channel."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), 255 - 255 * x / (width - 1))
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def mean_of(path: Path, channels: int = 3) -> torch.Tensor:
    return load_image(path, 16, channels).mean(dim=(1, 2)) * 255


def in_mode(mode: str) -> Image.Image:
    """Return COLOUR, or its grey, or white in black and white, as an image of a mode."""
    image = Image.new("RGB", (20, 20), COLOUR)
    if mode in SIXTEEN_BITS:
        return Image.new(mode, (20, 20), GREY * 257)
    steps = {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa"), "1": ("L", "1")}
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    if mode == "1":
        image = Image.new("RGB", (20, 20), "white")
    for step in steps.get(mode, (mode,)):
        image = image.convert(step)
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", EIGHT_BITS + SIXTEEN_BITS)
def test_every_mode_keeps_its_colour(mode, channels):
    image = in_mode(mode)
    assert image.mode == mode
    found = np.asarray(flattened(image, channels)).reshape(-1, channels).mean(axis=0)
    is_grey = mode in ("L", "LA", "La", *SIXTEEN_BITS) or channels == 1
    expected = (255,) if mode == "1" else (GREY,) if is_grey else COLOUR
    tolerance = {"LAB": 3, "P": 30, "PA": 30, "YCbCr": 2}.get(mode, 1.01)  # P has a palette of fixed colours
    assert np.abs(found - np.array(expected)).max() <= tolerance


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_range_is_refused_by_name(mode, tmp_path):
    Image.new(mode, (20, 20), 100).save(tmp_path / "depth.tiff")
    for read in (load_image, check_image):
        with pytest.raises(
            ValueError, match=rf"depth\.tiff: expected an image: Pillow's mode {mode} has no known range"
        ):
            read(tmp_path / "depth.tiff", 16, 1)


def test_a_png_of_16_bits_is_scaled(tmp_path):
    ramp_of_16_bits = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp_of_16_bits).save(tmp_path / "ramp.png")
    Image.fromarray((ramp_of_16_bits / 257).round().astype(np.uint8)).save(tmp_path / "8.png")
    for channels in (1, 3):
        assert torch.equal(
            load_image(tmp_path / "ramp.png", 32, channels), load_image(tmp_path / "8.png", 32, channels)
        )


@pytest.mark.parametrize("order", [">", "<"])
def test_a_tiff_of_16_bits_is_scaled_in_both_byte_orders(tmp_path, order):
    """A TIFF of one strip, written by hand: Pillow writes one byte order only."""
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(f"{order}u2")
    entries = {256: 64, 257: 64, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: pixels.nbytes}
    directory = struct.pack(f"{order}H", len(entries))
    for tag, value in entries.items():
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + pixels.nbytes)
    (tmp_path / "a.tiff").write_bytes(head + pixels.tobytes() + directory + bytes(4))
    assert abs(mean_of(tmp_path / "a.tiff", 1).item() - 127.5) < 1


@pytest.mark.parametrize(
    "save",
    [
        lambda path: Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(path),
        lambda path: Image.new("LA", (20, 20), (0, 0)).save(path),
        lambda path: Image.new("RGB", (20, 20), (1, 2, 3)).save(path, transparency=(1, 2, 3)),
        lambda path: Image.new("L", (20, 20), 7).save(path, transparency=7),
        lambda path: Image.new("RGB", (20, 20), "red").quantize().save(path, transparency=0),
        lambda path: Image.new("RGB", (20, 20), "red").quantize().save(path, transparency=b"\0"),
        lambda path: Image.new("I;16", (20, 20), 300).save(path, transparency=300),
        lambda path: Image.new("1", (20, 20), 0).save(path, transparency=0),
    ],
    ids=["RGBA", "LA", "RGB", "L", "P", "P with alpha", "16 bits", "1"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_becomes_white(tmp_path, save, channels):
    save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", 16, channels), torch.ones(channels, 16, 16))


def test_what_is_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (20, 20), (*COLOUR, 128)).save(tmp_path / "a.png")
    expected = torch.tensor(COLOUR) * 128 / 255 + 255 * 127 / 255
    torch.testing.assert_close(mean_of(tmp_path / "a.png"), expected, atol=1, rtol=0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, suffix):
    """The file holds the upright image turned back."""
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright = Image.fromarray(ramp())
    turn = back.get(orientation, TURNS.get(orientation))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    quality = {"quality": 100} if suffix in ("jpg", "webp") else {}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **quality)
    upright.save(tmp_path / "upright.png")
    found, expected = (load_image(tmp_path / name, 16, 3) for name in (f"a.{suffix}", "upright.png"))
    assert (found - expected).abs().max() < 0.06


def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a.png", exif=b"Exif\0\0not a TIFF")
    Image.fromarray(ramp()).save(tmp_path / "b.png")
    assert torch.equal(load_image(tmp_path / "a.png", 16, 3), load_image(tmp_path / "b.png", 16, 3))


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_the_first_frame_of_several_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    how = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **how)
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    torch.testing.assert_close(mean_of(tmp_path / "a.png"), torch.tensor([255.0, 0, 0]))


def truncated(path: Path, **options) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def claiming_png(path: Path) -> None:
    """Write a PNG of a few bytes that claims 4 billion pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))


BAD = {
    "truncated.jpg": truncated,
    "truncated.png": truncated,
    "truncated.webp": truncated,
    "truncated.bmp": truncated,
    "text.jpg": lambda path: path.write_text("no image"),
    "empty.png": lambda path: path.write_bytes(b""),
    "half a header.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
    "postscript.jpg": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "claims.png": claiming_png,
    "huge.png": lambda path: Image.new("1", (20000, 10000)).save(path),
    "large.png": lambda path: Image.new("1", (10000, 10000)).save(path),
    "long.png": lambda path: Image.new("1", (300_000, 1)).save(path),
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": os.mkfifo,
    "nowhere.png": lambda path: path.symlink_to("missing.png"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_value_error_that_names_it(tmp_path, name):
    BAD[name](tmp_path / name)
    for read in (load_image, check_image):
        with pytest.raises(ValueError, match=f"{name}: expected an image: [^ ]+ [^ ]+"):
            read(tmp_path / name, 32, 3)


def test_a_warning_that_is_an_error_names_the_file(tmp_path):
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"large\.png: .* 10000 x 10000 "),
    ):
        load_image(tmp_path / "large.png", 32, 3)
