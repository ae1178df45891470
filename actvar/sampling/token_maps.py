"""Token maps drawn from the dense model itself, in place of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from actvar.config import DENSE
from actvar.models.vqvae import without_decoder
from actvar.patching.patch import patched_silently


@torch.no_grad()
def sampled_inputs(
    var: nn.Module, images: int, batch: int, seed: int = 0, cfg: float = 1.5
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labels `[B]` and inputs `[B, L - first_l, Cvae]` for teacher forcing, as batches.

    The inputs are what sampling feeds to the word embedding, scale by scale. Classes are spread evenly and shuffled; no
    image is decoded.

    Args:
        cfg: guidance strength.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(images, generator=generator, device="cpu")
    labels = (torch.arange(images, device="cpu") * var.num_classes // images)[order]
    batches = []
    with patched_silently(var, DENSE, None), without_decoder(var.vae_proxy[0]), _inputs_of(var.word_embed) as inputs:
        for index, of_batch in enumerate(tqdm(labels.to(var.head.weight.device).split(batch), desc="sampling")):
            var.autoregressive_infer_cfg(len(of_batch), of_batch, g_seed=seed + index, cfg=cfg)
            batches.append((of_batch, torch.cat(inputs, dim=1)))
            inputs.clear()
    return batches


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].clone()))
    try:
        yield inputs
    finally:
        handle.remove()
