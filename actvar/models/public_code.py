"""Build the public VAR class with the weights of one of our models, to compare them."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from actvar.models.checkpoint.sizes import autoencoder_sizes, var_sizes


def public_classes(folder: Path) -> tuple[Any, Any]:
    """Return the classes `VAR` and `VQVAE` of a clone of the public VAR code, whose module `models` stays imported.

    Args:
        folder: the clone.

    Raises:
        ValueError: `folder` is no such clone.
        ImportError: the public code needs a package that is not installed.
    """
    if not (folder / "models" / "var.py").is_file():
        raise ValueError(f"expected a clone of the public VAR code, with models/var.py, got {folder}")
    sys.path.insert(0, str(folder))
    try:
        from models import VAR, VQVAE  # pyright: ignore[reportMissingImports]  # a module of the clone
    finally:
        sys.path.remove(str(folder))
    return VAR, VQVAE


def public_twin(var: Any, classes: tuple[Any, Any]) -> Any:
    """Return a public VAR with the weights of `var` on its device; it decodes by var's autoencoder.

    Args:
        var: an `actvar.models.VAR`.
        classes: the result of `public_classes`.
    """
    vae = var.vae_proxy[0]
    sizes, vae_sizes = var_sizes(var.state_dict()), autoencoder_sizes(vae.state_dict())
    public_var, public_vae = classes
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        twin_vae = public_vae(
            vocab_size=sizes.V,
            z_channels=sizes.Cvae,
            ch=32,
            share_quant_resi=vae_sizes.share_quant_resi,
            v_patch_nums=sizes.patch_nums,
        )
        twin = public_var(
            twin_vae,
            num_classes=sizes.num_classes,
            depth=sizes.depth,
            embed_dim=sizes.width,
            num_heads=sizes.heads,
            shared_aln=sizes.shared_aln,
            attn_l2_norm=sizes.attn_l2_norm,
            patch_nums=sizes.patch_nums,
            flash_if_available=False,
            fused_if_available=False,
        )
    twin_vae.quantize.load_state_dict(vae.quantize.state_dict())
    twin_vae.fhat_to_img = vae.fhat_to_img
    twin.load_state_dict(var.state_dict())
    device = var.head.weight.device
    twin_vae.to(device)
    twin.rng = torch.Generator(device)
    return twin.to(device).eval().requires_grad_(False)
