"""Build Infinity and its tokenizer with freshly initialised weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actvar.models.arguments import SEEDS, checked_integer
from actvar.models.basic_vae import NORM_GROUPS
from actvar.models.build import give_weights
from actvar.models.infinity.tokenizer import InfinityTokenizer
from actvar.models.infinity.transformer import Infinity
from actvar.utils.modes import inference_mode

OFFICIAL_SIZES: dict[str, dict[str, int]] = {
    "infinity-2b": dict(
        bits=32, spatial_patchify=0, depth=32, embed_dim=2048, num_heads=16, block_chunks=8, text_channels=2048
    ),
    "infinity-8b": dict(
        bits=14, spatial_patchify=1, depth=40, embed_dim=3584, num_heads=28, block_chunks=8, text_channels=2048
    ),
}
"""Arguments of `build_infinity` for the published models."""
OFFICIAL_CH_MULT = (1, 2, 4, 4, 4)
"""Widths of the tokenizer by resolution; with patchify the last one is left out, so that a token has 16x16 pixels."""


@inference_mode(False)
def build_infinity(
    bits: int,
    spatial_patchify: int | bool,
    depth: int,
    embed_dim: int,
    num_heads: int,
    block_chunks: int,
    text_channels: int,
    text_maxlen: int = 512,
    device: str | torch.device = "cpu",
    *,
    ch: int = 128,
    seed: int = 0,
) -> tuple[InfinityTokenizer, Infinity]:
    """Build `(tokenizer, infinity)` in eval mode; the tokenizer is at `infinity.vae_proxy[0]`.

    Args:
        bits: bits of a place of the tokenizer's map.
        spatial_patchify: whether a token stands for 2x2 places.
        depth, embed_dim, num_heads: number of blocks, channels, number of attention heads.
        block_chunks: number of chunks of blocks, which the keys tell; it divides `depth`.
        text_channels, text_maxlen: channels of the text features, and the most tokens of a text.
        device: where both models go; on `"meta"` they have shapes and no weights.
        ch: convolution width of the tokenizer, a multiple of 32.
        seed: seed of the generator that initialises the weights; torch's global generators are not touched.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, or sizes that do not divide each other as they must.
    """
    seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1])
    patchify = bool(checked_integer("spatial_patchify", int(spatial_patchify), 0, 1))
    tokenizer, infinity = infinity_skeleton(
        bits=bits,
        spatial_patchify=patchify,
        depth=depth,
        embed_dim=embed_dim,
        num_heads=num_heads,
        block_chunks=block_chunks,
        text_channels=text_channels,
        text_maxlen=text_maxlen,
        ch=ch,
        ch_mult=OFFICIAL_CH_MULT[: 4 if patchify else 5],
        num_res_blocks=2,
    )
    if torch.device(device).type == "meta":
        return tokenizer, infinity
    give_weights((tokenizer, infinity), device, seed)
    return tokenizer, infinity


def infinity_skeleton(
    *,
    bits: int,
    spatial_patchify: bool,
    depth: int,
    embed_dim: int,
    num_heads: int,
    block_chunks: int,
    text_channels: int,
    text_maxlen: int,
    ch: int,
    ch_mult: Sequence[int],
    num_res_blocks: int,
) -> tuple[InfinityTokenizer, Infinity]:
    """Return `(tokenizer, infinity)` in eval mode on the meta device, where they have shapes and no memory.

    Arguments and errors are those of `build_infinity`, and those of `InfinityTokenizer`.
    """
    counts = dict(bits=bits, depth=depth, embed_dim=embed_dim, num_heads=num_heads, block_chunks=block_chunks)
    counts |= dict(text_channels=text_channels, text_maxlen=text_maxlen, ch=ch, num_res_blocks=num_res_blocks)
    sizes = {name: checked_integer(name, count, 1) for name, count in counts.items()}
    if embed_dim % num_heads or (embed_dim // num_heads) % 4:
        raise ValueError(f"embed_dim: expected {num_heads} heads of a size that 4 divides, got {embed_dim} channels")
    if depth % block_chunks:
        raise ValueError(f"block_chunks: expected a number that divides the depth {depth}, got {block_chunks}")
    if ch % NORM_GROUPS:
        raise ValueError(f"ch: expected a multiple of {NORM_GROUPS}, got {ch}")
    with torch.device("meta"):
        tokenizer = InfinityTokenizer(sizes["bits"], sizes["ch"], ch_mult, sizes["num_res_blocks"])
        infinity = Infinity(
            tokenizer,
            spatial_patchify,
            sizes["depth"],
            sizes["embed_dim"],
            sizes["num_heads"],
            sizes["block_chunks"],
            sizes["text_channels"],
            sizes["text_maxlen"],
        )
    tokenizer.eval().requires_grad_(False)
    infinity.eval()
    return tokenizer, infinity
