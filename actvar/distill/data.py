"""Token maps to distil on: of Fashion-MNIST, of a folder of images, or sampled from the teacher itself.

They are computed once, kept in a `.npy` file and mapped into memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from actvar.files import replacing
from actvar.models import VAR, VQVAE
from actvar.training import barrier, rank, world_size
from actvar.zoo.fashion_mnist.data import load_labels, load_split

BATCH = 64
GUIDANCE = 1.5
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
MISSING = -1


@dataclass(frozen=True)
class Source:
    """Where token maps come from.

    Args:
        labels: classes `[N]` int64.
        tokens_of: token maps `[stop - start, L]` of examples `start` to `stop`.
        facts: what the token maps depend on, JSON-compatible.
    """

    labels: torch.Tensor
    tokens_of: Callable[[int, int], torch.Tensor]
    facts: dict[str, object]


def source_of(data: str, vae: VQVAE, var: VAR, samples: int, seed: int) -> Source:
    """The source that `data` names.

    Args:
        data: `"none"` for token maps sampled from `var`, a folder with the four files of Fashion-MNIST, or a folder
            with a subfolder of images per class.
        vae, var: the dense model and its autoencoder.
        samples, seed: number of token maps to sample, and the seed of the sampling noise; for `"none"` only.

    Raises:
        ValueError: a folder that holds neither, or not one subfolder per class of the model.
        FileNotFoundError: no such folder, or an incomplete one.
    """
    if data == "none":
        return sampled_source(var, samples, seed)
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (or `none`, to sample token maps from the model itself)")
    if any(folder.glob("train-images-idx3-ubyte*")):
        return fashion_mnist_source(folder, vae)
    return folder_source(folder, vae, var.num_classes)


def sampled_source(var: VAR, samples: int, seed: int) -> Source:
    """Token maps of `samples` images of the dense model, classes in turn, drawn with guidance 1.5."""
    labels = torch.arange(samples, device="cpu") % var.num_classes

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        return sample_token_maps(var, labels[start:stop].to(var.lvl_1L.device), seed * 1_000_003 + start)

    facts = {"data": "none", "guidance": GUIDANCE, "seed": seed, "model": digest(var.head.weight)}
    return Source(labels, tokens_of, facts)


def fashion_mnist_source(folder: Path, vae: VQVAE) -> Source:
    """Token maps of the 60,000 training images, which are read when the first of them is asked for."""
    labels = load_labels(folder, "train")
    images = functools.cache(lambda: load_split(folder, "train")[0])

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        return _encoded(vae, images()[start:stop])

    return Source(labels, tokens_of, {"data": str(folder.resolve()), "autoencoder": digest(vae.quant_conv.weight)})


def folder_source(folder: Path, vae: VQVAE, num_classes: int) -> Source:
    """Token maps of `folder/<class>/<image>`, classes in the order of the subfolders' names.

    Images are prepared as the public code prepares those it validates on: the shorter side becomes 1.125 times the
    model's, by Lanczos, and the centre is cut out.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(classes) != num_classes:
        raise ValueError(f"{folder}: expected a subfolder for each of the model's {num_classes} classes, got {classes}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{folder}: expected images {sorted(IMAGE_SUFFIXES)} in its subfolders, got none")
    side = vae.quantize.v_patch_nums[-1] * vae.downsample

    def tokens_of(start: int, stop: int) -> torch.Tensor:
        with ThreadPoolExecutor() as pool:
            loaded = pool.map(lambda path: load_image(path, side, vae.in_channels), files[start:stop])
            return _encoded(vae, torch.stack(list(loaded)))

    names = hashlib.sha256("\n".join(str(path.relative_to(folder)) for path in files).encode()).hexdigest()[:16]
    facts = {"data": str(folder.resolve()), "files": names, "autoencoder": digest(vae.quant_conv.weight)}
    return Source(torch.tensor(labels, device="cpu"), tokens_of, facts)


def load_image(path: Path, side: int, channels: int) -> torch.Tensor:
    """`[channels, side, side]` in [0, 1] of a file, with 1 channel (grey) or 3.

    Raises:
        ValueError: a file that is no image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected an image: {error}") from error
    shorter = round(side * 1.125)
    factor = shorter / min(image.size)
    width, height = (max(shorter, round(length * factor)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).view(side, side, channels).permute(2, 0, 1)


@torch.no_grad()
def sample_token_maps(var: VAR, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Token maps `[B, L]` int64 of one sampling run with guidance 1.5, of classes `labels` `[B]`."""
    maps: list[torch.Tensor] = []
    embedding = var.vae_proxy[0].quantize.embedding
    handle = embedding.register_forward_pre_hook(lambda _, arguments: maps.append(arguments[0]))
    try:
        var.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, cfg=GUIDANCE)
    finally:
        handle.remove()
    return torch.cat(maps, dim=1)


def _encoded(vae: VQVAE, images: torch.Tensor) -> torch.Tensor:
    device = vae.quantize.embedding.weight.device
    return torch.cat(vae.img_to_idxBl(images.to(device) * 2 - 1), dim=1)


def cached_tokens(source: Source, var: VAR, folder: Path) -> torch.Tensor:
    """Token maps `[N, L]` of `source`, mapped from a file in `folder` that is made on the first call.

    Several processes each make a part. What was finished before an interruption is not made again.

    Returns:
        int16, or int32 for more than 32,768 codes.
    """
    count, dtype = len(source.labels), np.int16 if var.V <= 2**15 else np.int32
    facts = source.facts | {"count": count, "patch_nums": var.patch_nums, "codes": var.V}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}.npy"
    if not path.exists():
        partial = folder / f"tokens-{key}.partial.npy"
        if rank() == 0 and not partial.exists():
            with replacing(partial) as temporary, temporary.open("wb") as file:
                # written, not mapped: on a full disk that is an error, and not the end of the process
                np.save(file, np.broadcast_to(np.array(MISSING, dtype), (count, var.L)))
        barrier()
        tokens = np.load(partial, mmap_mode="r+")
        starts = range(rank() * BATCH, count, world_size() * BATCH)
        for start in tqdm(starts, desc="token maps", disable=rank() != 0):
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
    """Transformer input `[B, L - first_l, Cvae]` for teacher forcing on token maps `[B, L]`."""
    sides = vae.quantize.v_patch_nums
    with torch.no_grad():
        return vae.quantize.teacher_input(tokens.long().split([side * side for side in sides], dim=1))


def digest(weight: torch.Tensor) -> str:
    """A few hexadecimal digits by which a model's weight is known again."""
    values = weight.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
