"""Token maps to distil on: of Fashion-MNIST, of a folder of images, or sampled from the teacher itself.

Those of Infinity, which has bits for tokens, are sampled for texts.

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
from typing import Any

import numpy as np
import torch

from actvar.distill.bits import as_bits, as_numbers
from actvar.distill.image_folder import find_images
from actvar.distill.images import load_image
from actvar.families import family_of
from actvar.families.conditions import Conditions, Texts, features_of
from actvar.models import VAR, VQVAE
from actvar.models.arguments import checked_integer
from actvar.sampling.token_maps import drawn_token_maps, number_of_conditions
from actvar.training.plan import SEEDS
from actvar.training.processes import barrier, rank, world_size
from actvar.utils.devices import device_of
from actvar.utils.files import replacing
from actvar.utils.fingerprint import fingerprint
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist.data import load_labels, load_split

BATCH = 64
MOST_TOKENS = 2**14
"""Tokens of all texts' images that are sampled at once, so that a GPU has the memory for their keys and values."""
GUIDANCE = 1.5
MISSING = -1


@dataclass(frozen=True)
class Source:
    """A source of token maps.

    Args:
        conditions: classes `[N]` int64, or texts, on the CPU.
        tokens_of: returns the token maps `[stop - start, L]` of examples `start` to `stop`; bits of a token are one
            number, see `actvar.distill.bits`.
        facts: all that the token maps depend on, JSON-compatible.
        description: of the images that were found, for people.
        at_once: number of examples that `tokens_of` is asked for.
    """

    conditions: Conditions
    tokens_of: Callable[[int, int], torch.Tensor]
    facts: Mapping[str, object]
    description: str = ""
    at_once: int = BATCH

    def take(self, index: torch.Tensor, device: torch.device) -> Conditions:
        """Return the conditions of examples with the numbers `index` `[n]` int64, on a device."""
        if isinstance(self.conditions, Texts):
            return self.conditions.take(index.tolist()).to(device)
        return self.conditions[index].to(device)


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


def sampled_source(var: Any, samples: int, seed: int, texts: Texts | None = None, cfg: float | None = None) -> Source:
    """Return token maps that the dense model draws, of classes or texts in turn.

    Args:
        var: the dense model.
        samples: number of images.
        seed: of the sampling noise.
        texts: of a model that draws from texts; None for classes.
        cfg: guidance strength; None for the default of the model's family.

    Raises:
        TypeError, ValueError: samples that are no integer of at least 1, a seed that is none of
            `actvar.training.plan.SEEDS`, no texts for a model that draws from texts, or texts for another one.
    """
    samples = checked_integer("samples", samples, 1)
    seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
    numbers = torch.arange(samples, device="cpu") % number_of_conditions(var, texts)
    conditions = numbers if texts is None else texts.take(numbers.tolist())
    guidance = family_of(var).default_cfg if cfg is None else cfg

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        of_images = conditions[start:stop].to(device_of(var))
        maps = drawn_token_maps(var, of_images, seed * 1_000_003 + start, guidance)
        return maps if texts is None else as_numbers(maps)

    facts = {"data": "none", "guidance": guidance, "seed": seed, "model": digest(var.head.weight)}
    if texts is None:
        return Source(conditions, tokens_of, facts)
    facts |= {"texts": fingerprint([("texts", features_of(texts))]), "tau": texts.tau}
    tokens = sum(height * width for height, width in family_of(var).maps_of(var, texts))
    return Source(conditions, tokens_of, facts, at_once=max(1, min(BATCH, MOST_TOKENS // tokens)))


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


def cached_tokens(source: Source, var: Any, folder: Path) -> torch.Tensor:
    """Return the token maps of `source`, mapped from a file that the first call makes.

    Several processes each make a part. Parts that were finished before an interruption are not made again.

    Args:
        source: of the token maps.
        var: the model, for its token maps' sizes and number of codes.
        folder: of the file.

    Returns:
        `[N, L]` int16, int32 for more than 32,768 codes, or int64 for more than 2^31.
    """
    family = family_of(var)
    count, maps, vocabulary = (
        len(source.conditions),
        family.maps_of(var, source.conditions),
        family.sizes(var).vocabulary,
    )
    codes = 2 ** (vocabulary // 2) if isinstance(source.conditions, Texts) else vocabulary
    dtype = next(kind for kind in (np.int16, np.int32, np.int64) if codes - 1 <= np.iinfo(kind).max)
    facts = {**source.facts, "count": count, "maps": maps, "codes": codes}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}.npy"
    tokens_of_image = sum(height * width for height, width in maps)
    if not path.exists():
        partial = folder / f"tokens-{key}.partial.npy"
        if rank() == 0 and not partial.exists():
            with replacing(partial) as temporary, temporary.open("wb") as file:
                # A write to a full disk is an error; a write to mapped memory would end the process there.
                np.save(file, np.broadcast_to(np.array(MISSING, dtype), (count, tokens_of_image)))
        barrier()
        tokens = np.load(partial, mmap_mode="r+")
        starts = range(rank() * source.at_once, count, world_size() * source.at_once)
        for start in progress(starts, desc="token maps", hidden=rank() != 0):
            stop = min(start + source.at_once, count)
            if (tokens[start:stop] == MISSING).any():
                tokens[start:stop] = source.tokens_of(start, stop).cpu().numpy()
        tokens.flush()
        barrier()
        if rank() == 0:
            partial.replace(path)
    barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


@torch.no_grad()
def examples(
    var: Any, source: Source, tokens: torch.Tensor, index: torch.Tensor
) -> tuple[Conditions, torch.Tensor, torch.Tensor]:
    """Return what a stage of the training is called with: conditions, inputs and token maps, on the model's device.

    Args:
        var: the model.
        source: of the token maps.
        tokens: the result of `cached_tokens`.
        index: numbers of the examples, `[n]` int64.

    Returns:
        conditions; inputs `[n, L - first_l, Cvae]` float32 for teacher forcing; tokens `[n, L]` int64, or bits
        `[n, L, bits]` uint8.
    """
    device, family = device_of(var), family_of(var)
    conditions, maps = source.take(index, device), tokens[index].to(device).long()
    if isinstance(conditions, Texts):
        maps = as_bits(maps, family.sizes(var).vocabulary // 2)
    return conditions, family.teacher_input(var, conditions, maps), maps


def digest(weight: torch.Tensor) -> str:
    """Return 16 hexadecimal digits that identify a weight by its values."""
    values = weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
