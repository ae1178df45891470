"""Read the sizes of Infinity and its tokenizer off the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from actvar.models.basic_vae import NORM_GROUPS
from actvar.models.checkpoint.sizes import count_indices, shape_of, width_multiples
from actvar.models.infinity import Infinity, InfinityTokenizer
from actvar.models.infinity.build import infinity_skeleton


@dataclass(frozen=True)
class InfinitySizes:
    """Hold the sizes of an Infinity transformer, with the names of `build_infinity`.

    Args:
        token_bits: bits of a token, which are four times those of a place of the tokenizer's map with patchify.
    """

    depth: int
    embed_dim: int
    num_heads: int
    block_chunks: int
    text_channels: int
    text_maxlen: int
    token_bits: int


@dataclass(frozen=True)
class TokenizerSizes:
    """Hold the sizes of Infinity's tokenizer, with the names of `InfinityTokenizer`."""

    bits: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int


def infinity_sizes(tensors: Mapping[str, Tensor]) -> InfinitySizes:
    """Read the sizes of a transformer off the shapes in its state dict.

    Raises:
        ValueError: a tensor that a size is read from is missing or cannot belong to Infinity.
    """
    embed_dim, token_bits = shape_of(tensors, "word_embed.weight", 2)
    text_maxlen, text_channels = shape_of(tensors, "cfg_uncond", 2)
    is_chunked = any(name.startswith("block_chunks.") for name in tensors)
    chunks = count_indices(tensors, "block_chunks.") if is_chunked else 1
    first = "block_chunks.0.module." if is_chunked else "blocks."
    return InfinitySizes(
        depth=chunks * count_indices(tensors, first),
        embed_dim=embed_dim,
        num_heads=shape_of(tensors, f"{first}0.sa.scale_mul_1H11", 4)[1],
        block_chunks=chunks,
        text_channels=text_channels,
        text_maxlen=text_maxlen,
        token_bits=token_bits,
    )


def tokenizer_sizes(tensors: Mapping[str, Tensor]) -> TokenizerSizes:
    """Read the sizes of a tokenizer off the shapes in its state dict.

    Raises:
        ValueError: a tensor that a size is read from is missing or cannot belong to Infinity's tokenizer.
    """
    ch = shape_of(tensors, "encoder.conv_in.conv.weight", 4)[0]
    ch_mult = width_multiples(tensors, ch, "conv.weight")
    return TokenizerSizes(
        bits=shape_of(tensors, "encoder.conv_out.conv.weight", 4)[0],
        ch=ch,
        ch_mult=ch_mult,
        num_res_blocks=count_indices(tensors, "encoder.down.0.block."),
    )


def infinity_pair(infinity: InfinitySizes, tokenizer: TokenizerSizes) -> tuple[InfinityTokenizer, Infinity]:
    """Return `(tokenizer, infinity)` on the meta device.

    Raises:
        ValueError: the two models do not belong together.
    """
    sizes = asdict(infinity)
    token_bits = sizes.pop("token_bits")
    if token_bits not in (tokenizer.bits, 4 * tokenizer.bits):
        raise ValueError(
            f"expected a tokenizer of {token_bits} bits, or of a quarter with patchify, as the transformer has it, "
            f"found {tokenizer.bits} bits; load the two files that were trained together"
        )
    return infinity_skeleton(**sizes, **asdict(tokenizer), spatial_patchify=token_bits != tokenizer.bits)


def infinity_alone(sizes: InfinitySizes) -> Infinity:
    """Return the transformer on the meta device, with the smallest tokenizer that fits it."""
    return infinity_pair(sizes, TokenizerSizes(sizes.token_bits, NORM_GROUPS, (1,), 1))[1]


def tokenizer_alone(sizes: TokenizerSizes) -> InfinityTokenizer:
    """Return the tokenizer on the meta device."""
    smallest = InfinitySizes(1, 4, 1, 1, text_channels=1, text_maxlen=1, token_bits=sizes.bits)
    return infinity_pair(smallest, sizes)[0]
