"""Read every model size off the shapes of a checkpoint's tensors, so that no configuration file is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import Tensor

from actvar.models.basic_vae import NORM_GROUPS
from actvar.models.build import OFFICIAL_PATCH_NUMS, skeleton
from actvar.models.transformer_block import HEAD_DIM
from actvar.models.var import VAR
from actvar.models.vqvae import VQVAE

VAR_KIND, AUTOENCODER_KIND = "var", "autoencoder"
INFINITY_KIND, TOKENIZER_KIND = "infinity", "infinity_tokenizer"
HIT_COUNTS = "quantize.ema_vocab_hit_SV"
DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "lfq.mask")
"""Last parts of the names of buffers that a file need not hold, since they follow from the sizes."""
_OFFICIAL_SIDES = (OFFICIAL_PATCH_NUMS, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
_MOST_SCALES = 100


@dataclass(frozen=True)
class VarSizes:
    """Hold the sizes of a transformer, with the names of `build_vae_var`; `heads` is the number of attention heads."""

    depth: int
    width: int
    heads: int
    num_classes: int
    V: int
    Cvae: int
    patch_nums: tuple[int, ...]
    shared_aln: bool
    attn_l2_norm: bool


@dataclass(frozen=True)
class AutoencoderSizes:
    """Hold the sizes of an autoencoder, with the names of `build_vae_var`.

    Args:
        scales: the number of token maps in its training, or None where the file does not tell.
    """

    V: int
    Cvae: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    image_channels: int
    share_quant_resi: int
    scales: int | None


def var_sizes(tensors: Mapping[str, Tensor]) -> VarSizes:
    """Read the sizes of a transformer off the shapes in its state dict, and off the values of `lvl_1L` if it is there.

    Raises:
        ValueError: a tensor that a size is read from is missing or cannot belong to a VAR transformer.
    """
    width, Cvae = shape_of(tensors, "word_embed.weight", 2)
    scale_mul = "blocks.0.attn.scale_mul_1H11"
    attn_l2_norm = scale_mul in tensors
    heads = shape_of(tensors, scale_mul, 4)[1] if attn_l2_norm else width // HEAD_DIM
    if heads * HEAD_DIM != width:
        raise ValueError(f"expected heads of size {HEAD_DIM}, found {heads} heads for width {width}")
    classes = shape_of(tensors, "class_emb.weight", 2)[0] - 1
    if classes < 1:
        raise ValueError("expected `class_emb.weight` of one class or more and the unconditional one, found one row")
    return VarSizes(
        depth=count_indices(tensors, "blocks."),
        width=width,
        heads=heads,
        num_classes=classes,
        V=shape_of(tensors, "head.weight", 2)[0],
        Cvae=Cvae,
        patch_nums=_patch_nums(tensors),
        shared_aln=any(key.startswith("shared_ada_lin.") for key in tensors),
        attn_l2_norm=attn_l2_norm,
    )


def width_multiples(tensors: Mapping[str, Tensor], ch: int, weight: str) -> tuple[int, ...]:
    """Return the widths of an encoder's resolutions over that of its first convolution.

    Args:
        tensors: a state dict.
        ch: width of the first convolution.
        weight: name of a convolution's weight, within it.

    Raises:
        ValueError: a weight is missing, or a width is no multiple.
    """
    levels = range(count_indices(tensors, "encoder.down."))
    widths = [shape_of(tensors, f"encoder.down.{level}.block.0.conv1.{weight}", 4)[0] for level in levels]
    if ch % NORM_GROUPS or any(width % ch for width in widths):
        raise ValueError(
            f"expected a first convolution width that is a multiple of {NORM_GROUPS} and others that are multiples "
            f"of the first, found {ch} and {widths}"
        )
    return tuple(width // ch for width in widths)


def autoencoder_sizes(tensors: Mapping[str, Tensor]) -> AutoencoderSizes:
    """Read the sizes of an autoencoder off the shapes in its state dict.

    Raises:
        ValueError: a tensor that a size is read from is missing or cannot belong to VAR's autoencoder.
    """
    V, Cvae = shape_of(tensors, "quantize.embedding.weight", 2)
    ch, image_channels = shape_of(tensors, "encoder.conv_in.weight", 4)[:2]
    ch_mult = width_multiples(tensors, ch, "weight")
    share_quant_resi = _share_quant_resi(tensors)
    trained_scales = shape_of(tensors, HIT_COUNTS, 2)[0] if HIT_COUNTS in tensors else None
    return AutoencoderSizes(
        V=V,
        Cvae=Cvae,
        ch=ch,
        ch_mult=ch_mult,
        num_res_blocks=count_indices(tensors, "encoder.down.0.block."),
        image_channels=image_channels,
        share_quant_resi=share_quant_resi,
        scales=count_indices(tensors, "quantize.quant_resi.") if share_quant_resi == 0 else trained_scales,
    )


def pair_skeleton(var: VarSizes, vae: AutoencoderSizes) -> tuple[VQVAE, VAR]:
    """Return `(vae, var)` on the meta device, with the transformer's patch_nums.

    Raises:
        ValueError: the two models do not belong together.
    """
    if (var.V, var.Cvae) != (vae.V, vae.Cvae):
        raise ValueError(
            f"expected an autoencoder with {var.V} codes of dimension {var.Cvae}, as the transformer has it, "
            f"found {vae.V} codes of dimension {vae.Cvae}; load the two files that were trained together"
        )
    if vae.share_quant_resi == 0 and vae.scales != len(var.patch_nums):
        raise ValueError(
            f"expected an autoencoder with {len(var.patch_nums)} scales, as the transformer has, "
            f"found one convolution for each of {vae.scales} scales; load the two files that were trained together"
        )
    arguments = {**asdict(var), **asdict(vae)}
    del arguments["heads"], arguments["scales"]
    return skeleton(**arguments)


def var_skeleton(sizes: VarSizes) -> VAR:
    """Return the transformer on the meta device, with the smallest autoencoder that fits it."""
    smallest = AutoencoderSizes(
        V=sizes.V,
        Cvae=sizes.Cvae,
        ch=32,
        ch_mult=(1,),
        num_res_blocks=1,
        image_channels=3,
        share_quant_resi=1,
        scales=len(sizes.patch_nums),
    )
    return pair_skeleton(sizes, smallest)[1]


def autoencoder_skeleton(sizes: AutoencoderSizes) -> VQVAE:
    """Return the autoencoder on the meta device, with arbitrary patch_nums."""
    scales = sizes.scales if sizes.share_quant_resi == 0 and sizes.scales is not None else 2
    smallest = VarSizes(
        depth=1,
        width=HEAD_DIM,
        heads=1,
        num_classes=1,
        V=sizes.V,
        Cvae=sizes.Cvae,
        patch_nums=tuple(range(1, max(scales, 2) + 1)),
        shared_aln=False,
        attn_l2_norm=False,
    )
    return pair_skeleton(smallest, sizes)[0]


def shape_of(tensors: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of the tensor `key`; raise a ValueError if it is missing or has other dimensions."""
    if key not in tensors:
        raise ValueError(f"expected a tensor `{key}`, found none of that name among {len(tensors)}")
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"expected `{key}` with {dimensions} dimensions, none of them empty, found shape {shape}")
    return shape


def count_indices(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many consecutive indices follow `prefix` in the names; raise a ValueError if one is missing."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    found = {int(match[1]) for match in map(pattern.match, tensors) if match}
    if found != set(range(len(found))) or not found:
        raise ValueError(f"expected `{prefix}0`, `{prefix}1` and so on without a gap, found {sorted(found)[:12]}")
    return len(found)


def _share_quant_resi(tensors: Mapping[str, Tensor]) -> int:
    """Return how the scales share the quantizer's convolutions, see `VectorQuantizer`."""
    if any(key.startswith("quantize.quant_resi.qresi_ls.") for key in tensors):
        return count_indices(tensors, "quantize.quant_resi.qresi_ls.")
    return 1 if any(key.startswith("quantize.quant_resi.qresi.") for key in tensors) else 0


def _patch_nums(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the sides of the token maps; scale `s` fills `patch_nums[s] ** 2` places of `lvl_1L` with its index."""
    if "lvl_1L" not in tensors:
        return _sides_from_totals(tensors)
    shape_of(tensors, "lvl_1L", 2)
    levels, counts = torch.unique_consecutive(tensors["lvl_1L"].flatten(), return_counts=True)
    sides = tuple(math.isqrt(count) for count in counts.tolist())
    if levels.tolist() != list(range(len(sides))) or [side * side for side in sides] != counts.tolist():
        raise ValueError(
            "expected `lvl_1L` to hold 0, 1, 2, ..., each as often as a square number, "
            f"found {levels.tolist()[:12]} with counts {counts.tolist()[:12]}"
        )
    return sides


def _sides_from_totals(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the official sides that fit the file's numbers of scales and tokens, or else the only possible sides."""
    scales = shape_of(tensors, "lvl_embed.weight", 2)[0]
    tokens, first = shape_of(tensors, "pos_1LC", 3)[1], shape_of(tensors, "pos_start", 3)[1]
    for sides in _OFFICIAL_SIDES:
        if (len(sides), sum(side * side for side in sides), sides[0] ** 2) == (scales, tokens, first):
            return sides
    start = math.isqrt(first)
    possible = _ascending_sides(scales - 1, tokens - first, start) if 2 <= scales <= _MOST_SCALES else ()
    if start * start != first or len(possible) != 1:
        raise ValueError(
            f"expected `lvl_1L`, without which the sides of {scales} token maps with {tokens} tokens together cannot "
            f"be told ({'several are' if possible else 'none is'} possible), found no tensor of that name"
        )
    return (start, *possible[0])


def _ascending_sides(scales: int, tokens: int, above: int) -> tuple[tuple[int, ...], ...]:
    """Return up to two ascending sequences of `scales` sides beyond `above` whose squares add up to `tokens`."""

    @cache
    def search(scales: int, tokens: int, above: int) -> tuple[tuple[int, ...], ...]:
        if scales == 1:
            side = math.isqrt(max(tokens, 0))
            return ((side,),) if side > above and side * side == tokens else ()
        found: list[tuple[int, ...]] = []
        side = above + 1
        while len(found) < 2 and sum((side + i) ** 2 for i in range(scales)) <= tokens:
            found += [(side, *rest) for rest in search(scales - 1, tokens - side * side, side)]
            side += 1
        return tuple(found[:2])

    return search(scales, tokens, above)
