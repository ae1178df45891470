"""A tiny VAR whose branches all matter."""

from __future__ import annotations

import torch

from actvar.models import VAR, build_vae_var
from support.golden import fill

PATCH_NUMS = (1, 2, 3, 5)
NUM_CLASSES = 10


def make_tiny_var(**changes) -> VAR:
    """Two blocks of width 128, four scales, one-channel images, weights by the golden rule."""
    sizes = dict(
        V=64,
        Cvae=8,
        ch=32,
        patch_nums=PATCH_NUMS,
        num_classes=NUM_CLASSES,
        depth=2,
        width=128,
        ch_mult=(1, 1),
        num_res_blocks=1,
        image_channels=1,
    )
    vae, var = build_vae_var(**(sizes | changes))
    fill(vae, 0)
    fill(var, 1)
    return var


def sample(var: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """Two images of classes 1 and 2."""
    return var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=seed, cfg=1.5, top_k=20, top_p=0.95)
