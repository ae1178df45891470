"""Build the autoencoder and the transformer with freshly initialised weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from actvar.models.arguments import SEEDS, checked_integer
from actvar.models.transformer_block import HEAD_DIM
from actvar.models.var import VAR
from actvar.models.vqvae import OFFICIAL_CHANNEL_MULTIPLIERS, VQVAE
from actvar.utils.modes import inference_mode

OFFICIAL_PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@inference_mode(False)
def build_vae_var(
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    patch_nums: Sequence[int] = OFFICIAL_PATCH_NUMS,
    num_classes: int = 1000,
    depth: int = 16,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    device: str | torch.device = "cpu",
    *,
    width: int | None = None,
    ch_mult: Sequence[int] = OFFICIAL_CHANNEL_MULTIPLIERS,
    num_res_blocks: int = 2,
    image_channels: int = 3,
    seed: int = 0,
) -> tuple[VQVAE, VAR]:
    """Build `(vae, var)` in eval mode; keyword names up to `device` are those of the public VAR code.

    Args:
        V, Cvae: codebook size and code dimension.
        ch, ch_mult, num_res_blocks, image_channels: see `VQVAE`; downsampling is `2^(len(ch_mult) - 1)`.
        share_quant_resi: see `VectorQuantizer`.
        patch_nums: token map side of every scale.
        num_classes, depth, shared_aln, attn_l2_norm: see `VAR`.
        device: where both models go; on `"meta"` they have shapes and no weights.
        width: transformer channels, a multiple of 64; `64 * depth` if None, as in the official models.
        seed: seed of the generator that initialises the weights; torch's global generators are not touched.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, a width that is not a multiple of 64, or patch_nums that are not two or more
            ascending sides.
    """
    seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
    vae, var = skeleton(
        V=V,
        Cvae=Cvae,
        ch=ch,
        share_quant_resi=share_quant_resi,
        patch_nums=patch_nums,
        num_classes=num_classes,
        depth=depth,
        shared_aln=shared_aln,
        attn_l2_norm=attn_l2_norm,
        width=width,
        ch_mult=ch_mult,
        num_res_blocks=num_res_blocks,
        image_channels=image_channels,
    )
    if torch.device(device).type == "meta":
        return vae, var
    give_weights((vae, var), device, seed)
    return vae, var


def give_weights(modules: Iterable[Any], device: str | torch.device, seed: int) -> None:
    """Initialise modules that are on the meta device, one after the other from one generator, and place them.

    Args:
        modules: with a method `init_weights(generator)`.
        device: where they go.
        seed: of the generator, which is on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for module in modules:
        module.to_empty(device="cpu")
        module.init_weights(generator)
        module.to(device)


def skeleton(
    *,
    V: int,
    Cvae: int,
    ch: int,
    share_quant_resi: int,
    patch_nums: Sequence[int],
    num_classes: int,
    depth: int,
    shared_aln: bool,
    attn_l2_norm: bool,
    width: int | None,
    ch_mult: Sequence[int],
    num_res_blocks: int,
    image_channels: int,
) -> tuple[VQVAE, VAR]:
    """Return `(vae, var)` in eval mode on the meta device, where they have shapes and no memory.

    Arguments and errors are those of `build_vae_var`.
    """
    counts = dict(V=V, Cvae=Cvae, ch=ch, num_classes=num_classes, depth=depth, num_res_blocks=num_res_blocks)
    counts |= dict(image_channels=image_channels)
    checked = [checked_integer(name, count, 1) for name, count in counts.items()]
    V, Cvae, ch, num_classes, depth, num_res_blocks, image_channels = checked
    share_quant_resi = checked_integer("share_quant_resi", share_quant_resi, 0)
    patch_nums = tuple(checked_integer("patch_nums", side, 1) for side in patch_nums)
    ch_mult = tuple(checked_integer("ch_mult", factor, 1) for factor in ch_mult)
    width = HEAD_DIM * depth if width is None else checked_integer("width", width, 1)
    if width % HEAD_DIM:
        raise ValueError(f"width must be a multiple of the head size {HEAD_DIM}, got {width}")
    if len(patch_nums) < 2 or any(a >= b for a, b in zip(patch_nums, patch_nums[1:], strict=False)):
        raise ValueError(f"patch_nums must be at least two ascending sides, got {tuple(patch_nums)}")
    with torch.device("meta"):
        vae = VQVAE(V, Cvae, ch, patch_nums, share_quant_resi, ch_mult, num_res_blocks, image_channels)
        var = VAR(vae, num_classes, depth, width, width // HEAD_DIM, patch_nums, shared_aln, attn_l2_norm)
    vae.eval().requires_grad_(False)
    var.eval()
    return vae, var
