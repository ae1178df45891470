"""Draw token maps from the dense model itself, in place of a data set."""

from __future__ import annotations

from typing import Any

import torch

from actvar.config import DENSE
from actvar.families import family_of
from actvar.models.vqvae import without_decoder
from actvar.patching.patch import patched_silently
from actvar.sampling.request import number_of_classes
from actvar.utils.devices import device_of
from actvar.utils.progress import progress


@torch.no_grad()
def sampled_inputs(
    var: Any, images: int, batch: int, seed: int = 0, cfg: float = 1.5
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of labels `[B]` int64 and inputs `[B, L - first_l, Cvae]` float32 for teacher forcing.

    Sampling feeds these inputs to the word embedding, scale by scale. Classes are spread evenly and shuffled. No image
    is decoded.

    Args:
        var: the model, dense or patched.
        images: samples to draw.
        batch: samples per batch, B; the last batch may have fewer.
        seed: seed of the order of the classes; batch number b is drawn with `seed + b`.
        cfg: guidance strength.

    Raises:
        TypeError: a model that draws from texts.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(images, generator=generator, device="cpu")
    labels = (torch.arange(images, device="cpu") * number_of_classes(var) // images)[order]
    batches = []
    for index, batch_labels in enumerate(progress(labels.to(device_of(var)).split(batch), desc="sampling")):
        token_maps = drawn_token_maps(var, batch_labels, seed + index, cfg)
        batches.append((batch_labels, family_of(var).teacher_input(var, token_maps)))
    return batches


@torch.no_grad()
def drawn_token_maps(var: Any, labels: torch.Tensor, seed: int, cfg: float) -> torch.Tensor:
    """Return the tokens `[B, L]` int64 that the dense model draws, without decoding an image.

    Args:
        var: the model, dense or patched.
        labels: classes `[B]` int64 on the model's device.
        seed: seed of the sampling noise.
        cfg: guidance strength.
    """
    family = family_of(var)
    maps: list[Any] = []
    with (
        patched_silently(var, DENSE, None),
        without_decoder(family.autoencoder(var)),
        family.watch_scales(var, lambda _scale, tokens, _features: maps.append(tokens)),
    ):
        var.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, cfg=cfg)
    return torch.cat(maps, dim=1)
