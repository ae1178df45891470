"""Define Infinity's bitwise tokenizer: an image as maps of bits from 1x1 up to the full grid, and back.

Source: Infinity (Han et al., 2024), binary spherical quantization of the residual of all scales before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.infinity.tokenizer_layers import Decoder, Encoder

Maps = Sequence[tuple[int, int, int]]


class BitQuantizer(nn.Module):
    """Quantize vectors of `bits` numbers to the corners of a cube in the unit sphere: a bit is the sign of a number."""

    mask: torch.Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("mask", torch.empty(bits, dtype=torch.int64))

    def to_bits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the bits `[B, h, w, bits]` uint8 of features `[B, bits, h, w]`."""
        return (features > 0).permute(0, 2, 3, 1).to(torch.uint8)

    def to_codes(self, bits: torch.Tensor) -> torch.Tensor:
        """Return the codes `[B, bits, h, w]` float32 of bits `[B, h, w, bits]`, numbers of any dtype."""
        return (2 * bits.permute(0, 3, 1, 2).float() - 1) * self.bits**-0.5


class MultiScaleQuantizer(nn.Module):
    """Quantize the residual of all scales before at every scale, and add up the codes of all scales."""

    def __init__(self, bits: int):
        super().__init__()
        self.lfq = BitQuantizer(bits)

    def bits_of(self, features: torch.Tensor, schedule: Maps) -> list[torch.Tensor]:
        """Return the bits of every scale, `[B, h, w, bits]` uint8.

        Args:
            features: what the encoder returns, `[B, bits, H, W]`.
            schedule: `(1, h, w)` of every scale; the last one is `(1, H, W)`.

        Raises:
            ValueError: a last map of another size than the features.
        """
        if tuple(schedule[-1]) != (1, *features.shape[2:]):
            raise ValueError(f"schedule: expected {(1, *features.shape[2:])} as last map, got {tuple(schedule[-1])}")
        rest, maps = features.float(), []
        for _, h, w in schedule:
            maps.append(self.lfq.to_bits(F.adaptive_avg_pool2d(rest, (h, w))))
            rest = rest - resized(self.lfq.to_codes(maps[-1]), rest.shape[2:])
        return maps

    def features_of(self, bits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of all scales' codes on the last scale's grid, `[B, bits, H, W]` float32.

        Args:
            bits: the bits of every scale, `[B, h, w, bits]`.
        """
        size = bits[-1].shape[1:3]
        return torch.stack([resized(self.lfq.to_codes(of_scale), size) for of_scale in bits]).sum(0)


def resized(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return maps `[B, C, h, w]` interpolated to `size` `(H, W)`, linearly along both axes."""
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class InfinityTokenizer(nn.Module):
    """Encode images in [-1, 1] as maps of bits, and decode them.

    Args:
        bits: bits of a map's place.
        ch: convolution width.
        ch_mult: multiplier of the convolution width per resolution; a place stands for `2^(len - 1)` pixels a side.
        num_res_blocks: residual blocks per resolution.
    """

    def __init__(self, bits: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int):
        super().__init__()
        self.bits, self.downsample = bits, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, bits)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, bits)
        self.quantizer = MultiScaleQuantizer(bits)
        self.quantize = self.quantizer  # the official files have its buffer under both names

    @torch.no_grad()
    def encode(self, image: torch.Tensor, schedule: Maps) -> list[torch.Tensor]:
        """Return the bits of every scale of an image, `[B, h, w, bits]` uint8.

        Args:
            image: `[B, 3, H, W]` in [-1, 1].
            schedule: `(1, h, w)` of every scale; `InfinityTokenizer.downsample` times the last one is `H`, `W`.

        Raises:
            ValueError: a last map that does not fit the image.
        """
        return self.quantizer.bits_of(self.encoder(image), schedule)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the images `[B, 3, H, W]` in [-1, 1] of features `[B, bits, h, w]`."""
        return self.decoder(features.to(self.decoder.conv_in.conv.weight.dtype)).clamp(-1, 1)

    @torch.no_grad()
    def decode_bits(self, bits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the images `[B, 3, H, W]` in [-1, 1] of the bits of every scale, `[B, h, w, bits]`."""
        return self.decode(self.quantizer.features_of(bits))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter and buffer from `generator` alone."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
                module.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess] every convolution has one
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.init_buffers()

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Fill the quantizer's mask with the powers of two that the official files have there."""
        mask = self.quantizer.lfq.mask
        mask.copy_(2 ** torch.arange(self.bits - 1, -1, -1, device=mask.device))
