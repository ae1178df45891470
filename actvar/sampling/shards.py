"""Draw many images of one model into files, resumably, by several processes, and export them for OpenAI's evaluator.

Image `i` has a class and noise of its own, which follow from the settings and `i` alone. Batch `b` always has the same
images and becomes shard `b`, or as many PNGs, whichever process draws it. On one kind of machine, with one number of
threads, the files are therefore the same bit for bit for every number of processes. Another batch size may change how
matrix products round. Images then agree to rounding, and a token differs where rounding decides its draw.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from actvar.families import family_of
from actvar.models import VAR, Infinity
from actvar.models.arguments import checked_integer
from actvar.sampling.image_files import IMAGE_FILES, Batch, ImageFiles
from actvar.sampling.request import Sampling
from actvar.sampling.text_request import TextSampling
from actvar.utils.files import replacing
from actvar.utils.fingerprint import model_fingerprint
from actvar.utils.pictures import pixel_values
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped

MANIFEST = "manifest.json"
MOST_IMAGES = 2**63 - 1
"""The largest length of a range that `len` can return."""
SEEDS = 2**32
"""The number of different seeds of torch's generator on the CPU, which ignores higher bits."""


@dataclass(frozen=True)
class Bulk:
    """Hold a request for `num` images; image `i` is of class or text `sampling.labels[i % len(sampling.labels)]`.

    Args:
        sampling: classes or texts, guidance, filters and the one seed from which those of all images follow.
        num: number of images.
        batch: images per batch and shard.
        format: of the files, `"safetensors"` for a shard per batch or `"png"` for a PNG per image; or the files
            themselves, such as an `actvar.sampling.layouts.Layout`.

    Raises:
        TypeError: a seed that is not one int, a number of images or a batch that is no integer.
        ValueError: a number of images or a batch that is not in 1 ... `MOST_IMAGES`, images that the classes or
            texts cannot share equally, or an unknown format.
    """

    sampling: Sampling | TextSampling
    num: int
    batch: int = 50
    format: str | ImageFiles = "safetensors"

    def __post_init__(self):
        if not isinstance(self.sampling.seed, int):
            raise TypeError(f"seed: expected an int, from which every image's follows, got {self.sampling.seed!r}")
        for name in ("num", "batch"):
            object.__setattr__(self, name, checked_integer(name, getattr(self, name), 1, MOST_IMAGES))
        if isinstance(self.format, str) and self.format not in IMAGE_FILES:
            raise ValueError(f"format: expected one of {list(IMAGE_FILES)}, got {self.format!r:.100}")
        classes = len(self.sampling.labels)
        if not classes or self.num % classes:
            what = "classes" if isinstance(self.sampling, Sampling) else "prompts"
            raise ValueError(
                f"num: expected a multiple of the {classes} {what}, so that each has as many images, got {self.num}"
            )

    @property
    def seed(self) -> int:
        """Return the one seed of the request."""
        assert isinstance(self.sampling.seed, int)  # checked on construction
        return self.sampling.seed

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return -(-self.num // self.batch)

    @property
    def files(self) -> ImageFiles:
        """Return the kind of files of the images."""
        return IMAGE_FILES[self.format] if isinstance(self.format, str) else self.format

    def batch_of(self, shard: int) -> Batch:
        """Return the images of a shard with their classes."""
        return Batch(shard, self.images_of(shard), self.labels_of(shard))

    def images_of(self, shard: int) -> range:
        """Return the numbers of the images of a shard."""
        return range(shard * self.batch, min((shard + 1) * self.batch, self.num))

    def count_of(self, shards: range) -> int:
        """Return how many images `shards` have together, in constant time."""
        last_fill = len(self.images_of(self.shards - 1))
        return len(shards) * self.batch - (self.batch - last_fill if self.shards - 1 in shards else 0)

    def labels_of(self, shard: int) -> tuple[int, ...]:
        """Return the classes of the images of a shard."""
        classes = self.sampling.labels
        return tuple(classes[image % len(classes)] for image in self.images_of(shard))

    def seeds_of(self, shard: int) -> tuple[int, ...]:
        """Return the seeds of the images of a shard."""
        return tuple(image_seed(self.seed, image) for image in self.images_of(shard))

    def run(self, var: nn.Module, shard: int) -> np.ndarray:
        """Sample a shard, and return its images `[b, H, W, C]` uint8."""
        images = replace(self.sampling, labels=self.labels_of(shard), seed=self.seeds_of(shard)).run(var)
        return pixel_values(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def image_seed(seed: int, image: int) -> int:
    """Return the seed of image number `image`, which differs for the first 2^32 images of a run."""
    first = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")
    return (first + image) % SEEDS


def sample_many(var: nn.Module, bulk: Bulk, folder: Path, rank: int = 0, processes: int = 1) -> None:
    """Draw the images that `folder` does not have yet.

    `folder` gets the settings as `manifest.json`, and the files of `bulk.format`, see `actvar.sampling.image_files`. A
    file is complete or not there, and the batch of a damaged one is drawn again.

    Args:
        var: a dense or patched `actvar.models.VAR`, or for texts `actvar.models.Infinity`.
        bulk: the images to draw.
        folder: the folder to write to, made if it is missing.
        rank, processes: this process's number, and how many share the work. They need no connection but the folder.
            Process 0 returns when all shards are there, another one when its own are.

    Raises:
        TypeError: a model that does not draw such images, or takes no seed per image.
        ValueError: `folder` holds images of other settings or another model; the message names what differs.
    """
    kind, loader = (VAR, "load_var") if isinstance(bulk.sampling, Sampling) else (Infinity, "load_infinity")
    if not isinstance(unwrapped(var), kind):
        name = f"actvar.models.{kind.__name__} (actvar.{loader} makes one)"
        raise TypeError(f"var: expected {name}, got {type(var).__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _settings(var, bulk), bulk.files.pattern)
    mine = range(rank, bulk.shards, processes)
    with progress(total=bulk.count_of(mine), desc="sampling", unit="image", hidden=rank != 0) as bar:
        for shard in mine:  # not listed first, since there may be very many
            if not _is_complete(folder, bulk, shard):
                bulk.files.write(folder, bulk.batch_of(shard), bulk.run(var, shard))
            bar.update(len(bulk.images_of(shard)))
    if rank == 0:
        for shard in range(bulk.shards):
            while not _is_complete(folder, bulk, shard):
                time.sleep(0.2)
        for left_by_a_kill in (*folder.glob(f".{MANIFEST}.*"), *_left_by_a_kill(folder, bulk.files.pattern)):
            left_by_a_kill.unlink(missing_ok=True)


def _left_by_a_kill(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the temporary files beside files of names like `pattern`."""
    folders, _, name = pattern.rpartition("/")
    yield from folder.glob(f"{folders}/.{name}.*" if folders else f".{name}.*")


def read_images(folder: Path, bulk: Bulk) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[num, H, W, C]` uint8 and labels `[num]` int64 of `sample_many`, in the order of the images.

    Args:
        folder: the folder that `sample_many` wrote to.
        bulk: its request.

    Raises:
        ValueError: images are missing or damaged.
    """
    _expect_complete(folder, bulk)
    images = np.stack([read_image(folder, bulk, image) for image in range(bulk.num)])
    return images, np.array([label for shard in range(bulk.shards) for label in bulk.labels_of(shard)])


def write_npz(folder: Path, bulk: Bulk, file: Path) -> None:
    """Write the images of `sample_many` as OpenAI's evaluator reads them, with one image in memory at a time.

    The file holds `arr_0` `[num, H, W, 3]` uint8, where grey images have three equal channels, and their classes
    `arr_1` `[num]` int64. The images are permuted by the seed, since the evaluator's Inception Score is computed on
    consecutive parts.

    Args:
        folder: the folder that `sample_many` wrote to.
        bulk: its request.
        file: the `.npz` file to write.

    Raises:
        ValueError: images are missing or damaged.
    """
    _expect_complete(folder, bulk)
    order = np.random.default_rng(image_seed(bulk.seed, 0)).permutation(bulk.num)
    height, width, _ = read_image(folder, bulk, 0).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (bulk.num, height, width, 3)}
    labels = np.array([label for shard in range(bulk.shards) for label in bulk.labels_of(shard)])
    with replacing(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for image in progress(order.tolist(), desc=file.name, unit="image"):
                pixels = read_image(folder, bulk, image)
                stream.write(np.broadcast_to(pixels, (height, width, 3)).tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, labels[order])


def _is_complete(folder: Path, bulk: Bulk, shard: int) -> bool:
    """Return whether the files of a shard can be read and have the shard's labels."""
    return bulk.files.is_complete(folder, bulk.batch_of(shard))


def _expect_complete(folder: Path, bulk: Bulk) -> None:
    """Raise a ValueError unless every shard is complete."""
    for shard in range(bulk.shards):
        if not _is_complete(folder, bulk, shard):
            images = bulk.images_of(shard)
            raise ValueError(
                f"{folder}: expected complete files of the images {images[0]} to {images[-1]}; sample again with the "
                "same settings"
            )


def read_image(folder: Path, bulk: Bulk, image: int) -> np.ndarray:
    """Return image number `image` of `sample_many`, `[H, W, C]` uint8, without reading the others."""
    shard, row = divmod(image, bulk.batch)
    return bulk.files.read(folder, bulk.batch_of(shard), row)


def _settings(var: nn.Module, bulk: Bulk) -> dict[str, object]:
    """Return everything that the images depend on, as JSON values."""
    model = unwrapped(var)
    weight = model.head.weight
    settings = bulk.sampling.settings() | {
        "num": bulk.num,
        "batch": bulk.batch,
        "format": bulk.files.name,
        "actvar": asdict(model.actvar.config) if hasattr(model, "actvar") else None,
        "execution": asdict(model.actvar.execution) if hasattr(model, "actvar") else None,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "weights": model_fingerprint(model, family_of(model).autoencoder(model)),
    }
    return json.loads(json.dumps(settings))


def _claim(folder: Path, settings: dict[str, object], pattern: str) -> None:
    """Write the manifest beside files of names like `pattern`, or check the one that is there."""
    path = folder / MANIFEST
    images = any(folder.glob(pattern))  # before the manifest: another process may be starting
    if not path.exists():
        if images:
            raise ValueError(f"{folder}: expected {MANIFEST} beside the images; choose another folder")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n", "utf-8")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}; choose another folder") from error
    if not isinstance(found, dict) or found.keys() != settings.keys():
        raise ValueError(f"{path}: expected settings named {', '.join(settings)}; choose another folder")
    differing = [
        f"{name} {found[name]} there, {settings[name]} here" for name in settings if found[name] != settings[name]
    ]
    if differing:
        raise ValueError(f"{path}: made with other settings: {'; '.join(differing)}; choose another folder")
