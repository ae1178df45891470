"""Sizes of the bundled model."""

from __future__ import annotations

import torch

from actvar.models import VAR, VQVAE, build_vae_var

PATCH_NUMS = (1, 2, 3, 4, 6, 8)


def build(seed: int = 0, device: str | torch.device = "cpu") -> tuple[VQVAE, VAR]:
    """Freshly initialised autoencoder (32x32 grey images, 4x downsampling) and transformer; see `build_vae_var`."""
    return build_vae_var(
        V=512,
        Cvae=16,
        ch=32,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        image_channels=1,
        patch_nums=PATCH_NUMS,
        num_classes=10,
        depth=6,
        width=192,
        shared_aln=True,
        device=device,
        seed=seed,
    )
