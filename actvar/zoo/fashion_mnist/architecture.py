"""Sizes of the bundled models."""

from __future__ import annotations

import torch

from actvar.models import VAR, VQVAE, build_vae_var

PATCH_NUMS = (1, 2, 3, 4, 6, 8)
SMALL = {"depth": 4, "width": 128}


def build(seed: int = 0, device: str | torch.device = "cpu", depth: int = 6, width: int = 192) -> tuple[VQVAE, VAR]:
    """Return a new autoencoder for 32x32 grey images, with 4x downsampling, and a new transformer.

    Args:
        seed: of the initial weights.
        device: of both models.
        depth: blocks of the transformer.
        width: channels of a token.
    """
    return build_vae_var(
        V=512,
        Cvae=16,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        image_channels=1,
        patch_nums=PATCH_NUMS,
        num_classes=10,
        depth=depth,
        width=width,
        shared_aln=True,
        device=device,
        seed=seed,
    )
