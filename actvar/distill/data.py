"""Token maps to distil on: of Fashion-MNIST, of a folder of images, or sampled from the teacher itself.

Token maps are computed once, kept in a `.npy` file and mapped into memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actvar.distill.image_folder import find_images
from actvar.distill.images import load_image
from actvar.families import family_of
from actvar.models import VAR, VQVAE
from actvar.models.arguments import checked_integer
from actvar.sampling.request import number_of_classes
from actvar.sampling.token_maps import drawn_token_maps
from actvar.training.plan import SEEDS
from actvar.training.processes import barrier, rank, world_size
from actvar.utils.devices import device_of
from actvar.utils.files import replacing
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist.data import load_labels, load_split

BATCH = 64
GUIDANCE = 1.5
MISSING = -1


@dataclass(frozen=True)
class Source:
    """A source of token maps.

    Args:
        labels: classes, `[N]` int64.
        tokens_of: returns the token maps `[stop - start, L]` of examples `start` to `stop`.
        facts: all that the token maps depend on, JSON-compatible.
        description: of the images that were found, for people.
    """

    labels: torch.Tensor
    tokens_of: Callable[[int, int], torch.Tensor]
    facts: Mapping[str, object]
    description: str = ""


def source_of(
    data: str,
    vae: VQVAE,
    var: VAR,
    samples: int,
    seed: int,
    *,
    mapping: Path | None = None,
    skip_bad: bool = False,
    cache: Path | None = None,
) -> Source:
    """Return the source that `data` names.

    Args:
        data: `"none"` for token maps sampled from `var`, a folder with the four files of Fashion-MNIST, or a folder
            with a subfolder of images per class.
        vae: the autoencoder.
        var: the dense model.
        samples: number of token maps to sample; for `"none"` only.
        seed: of the sampling noise; for `"none"` only.
        mapping, skip_bad, cache: see `folder_source`; for a folder of images only.

    Raises:
        ValueError: a folder of neither kind, the errors of `folder_source`, or a mapping or `skip_bad` without a folder
            of images.
        FileNotFoundError: no such folder, or an incomplete one.
    """
    folder = Path(data)
    is_folder_of_images = data != "none" and not any(folder.glob("train-images-idx3-ubyte*"))
    if (mapping or skip_bad) and not is_folder_of_images:
        raise ValueError(f"expected a folder of images for --class-numbers and --skip-bad, got {data}")
    if data == "none":
        return sampled_source(var, samples, seed)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (or `none`, to sample token maps from the model itself)")
    if is_folder_of_images:
        return folder_source(folder, vae, var.num_classes, mapping, skip_bad, cache)
    return fashion_mnist_source(folder, vae)


def sampled_source(var: VAR, samples: int, seed: int) -> Source:
    """Return token maps of images that the dense model draws with guidance 1.5, classes in turn.

    Args:
        var: the dense model.
        samples: number of images.
        seed: of the sampling noise.

    Raises:
        TypeError, ValueError: samples that are no integer of at least 1, a seed that is none of
            `actvar.training.plan.SEEDS`, a model that draws from texts.
    """
    samples = checked_integer("samples", samples, 1)
    seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
    labels = torch.arange(samples, device="cpu") % number_of_classes(var)

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        return drawn_token_maps(var, labels[start:stop].to(device_of(var)), seed * 1_000_003 + start, GUIDANCE)

    facts = {"data": "none", "guidance": GUIDANCE, "seed": seed, "model": digest(var.head.weight)}
    return Source(labels, tokens_of, facts)


def fashion_mnist_source(folder: Path, vae: VQVAE) -> Source:
    """Return the token maps of the 60,000 training images, which are read when the first of them is asked for."""
    labels = load_labels(folder, "train")
    images = functools.cache(lambda: load_split(folder, "train")[0])

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        return _encoded(vae, images()[start:stop])

    return Source(labels, tokens_of, {"data": str(folder.resolve()), "autoencoder": digest(vae.quant_conv.weight)})


def folder_source(
    folder: Path,
    vae: VQVAE,
    num_classes: int,
    mapping: Path | None = None,
    skip_bad: bool = False,
    cache: Path | None = None,
) -> Source:
    """Return the token maps of `folder/<class>/<image>`, see `actvar.distill.image_folder.find_images`.

    Every image is checked first. Images are prepared like those that the public code validates on, see `load_image`.

    Args:
        folder: with a subfolder of images per class.
        vae: the autoencoder.
        num_classes: of the model.
        mapping: a JSON file with the class of each folder; None: the folders' names tell the classes.
        skip_bad: leave out images that cannot be read.
        cache: folder that keeps the list of images that cannot be read; None: nothing is kept.

    Raises:
        ValueError: folders whose classes are not known, no image, or some that cannot be read.
    """
    side = vae.quantize.v_patch_nums[-1] * vae.downsample
    images = find_images(folder, num_classes, mapping).readable(side, vae.in_channels, skip_bad, cache)

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        with ThreadPoolExecutor() as pool:
            loaded = pool.map(lambda path: load_image(path, side, vae.in_channels), images.files[start:stop])
            return _encoded(vae, torch.stack(list(loaded)))

    facts = {"data": str(folder.resolve()), "files": images.key(), "autoencoder": digest(vae.quant_conv.weight)}
    return Source(torch.tensor(images.labels, device="cpu"), tokens_of, facts, images.described())


def _encoded(vae: VQVAE, images: torch.Tensor) -> torch.Tensor:
    device = vae.quantize.embedding.weight.device
    return torch.cat(vae.img_to_idxBl(images.to(device) * 2 - 1), dim=1)


def cached_tokens(source: Source, var: VAR, folder: Path) -> torch.Tensor:
    """Return the token maps of `source`, mapped from a file that the first call makes.

    Several processes each make a part. Parts that were finished before an interruption are not made again.

    Args:
        source: of the token maps.
        var: the model, for its token maps' sizes and number of codes.
        folder: of the file.

    Returns:
        `[N, L]` int16, or int32 for more than 32,768 codes.
    """
    count, dtype = len(source.labels), np.int16 if var.V <= 2**15 else np.int32
    facts = {**source.facts, "count": count, "maps": family_of(var).maps(var), "codes": var.V}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}.npy"
    if not path.exists():
        partial = folder / f"tokens-{key}.partial.npy"
        if rank() == 0 and not partial.exists():
            with replacing(partial) as temporary, temporary.open("wb") as file:
                # A write to a full disk is an error; a write to mapped memory would end the process there.
                np.save(file, np.broadcast_to(np.array(MISSING, dtype), (count, var.L)))
        barrier()
        tokens = np.load(partial, mmap_mode="r+")
        starts = range(rank() * BATCH, count, world_size() * BATCH)
        for start in progress(starts, desc="token maps", hidden=rank() != 0):
            stop = min(start + BATCH, count)
            if (tokens[start:stop] == MISSING).any():
                tokens[start:stop] = source.tokens_of(start, stop).cpu().numpy()
        tokens.flush()
        barrier()
        if rank() == 0:
            partial.replace(path)
    barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def teacher_inputs(vae: VQVAE, tokens: torch.Tensor) -> torch.Tensor:
    """Return the transformer's inputs `[B, L - first_l, Cvae]` for teacher forcing on `tokens` `[B, L]`.

    Args:
        vae: the autoencoder.
        tokens: token maps of an integer dtype.
    """
    sides = vae.quantize.v_patch_nums
    with torch.no_grad():
        return vae.quantize.teacher_input(tokens.long().split([side * side for side in sides], dim=1))


def digest(weight: torch.Tensor) -> str:
    """Return 16 hexadecimal digits that identify a weight by its values."""
    values = weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
