"""Define VAR's convolutional autoencoder. State-dict keys follow the official `vae_ch160v4096z32.pth`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actvar.models.basic_vae import Conv3x3, Decoder, Encoder
from actvar.models.fused_vae import channels_last, decoded, encoded
from actvar.models.quantizer import VectorQuantizer
from actvar.utils.attributes import replaced
from actvar_kernels.situation import TORCH, situation

OFFICIAL_CHANNEL_MULTIPLIERS = (1, 1, 2, 2, 4)


class VQVAE(nn.Module):
    """Encode images in [-1, 1] as token maps and decode them, by a multi-scale residual quantizer.

    Args:
        vocab_size: number of codes `V`.
        z_channels: code dimension `Cvae`.
        ch: convolution width.
        patch_nums: side of the token map of every scale.
        share_quant_resi: see `VectorQuantizer`.
        ch_mult: multiplier of the convolution width per resolution.
        num_res_blocks: residual blocks per resolution.
        in_channels: image channels.
    """

    def __init__(
        self,
        vocab_size: int,
        z_channels: int,
        ch: int,
        patch_nums: Sequence[int],
        share_quant_resi: int = 4,
        ch_mult: Sequence[int] = OFFICIAL_CHANNEL_MULTIPLIERS,
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ):
        super().__init__()
        self.vocab_size, self.Cvae, self.ch = vocab_size, z_channels, ch
        self.ch_mult, self.num_res_blocks, self.in_channels = tuple(ch_mult), num_res_blocks, in_channels
        self.downsample = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, in_channels, z_channels)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, in_channels, z_channels)
        self.quantize = VectorQuantizer(vocab_size, z_channels, patch_nums, share_quant_resi)
        self.quant_conv = Conv3x3(z_channels, z_channels)
        self.post_quant_conv = Conv3x3(z_channels, z_channels)

    def img_to_features(self, image: torch.Tensor) -> torch.Tensor:
        """Return the features `[B, Cvae, P, P]`, not yet quantized, of an image `[B, in_channels, H, W]` in [-1, 1]."""
        return encoded(self.encoder, self.quant_conv, image)

    def fhat_to_img(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Decode quantized features `[B, Cvae, P, P]` to an image `[B, in_channels, H, W]` in [-1, 1]."""
        if f_hat.device.type == "cpu" and situation(f_hat) != TORCH:  # oneDNN's convolutions take less time so
            f_hat = channels_last(f_hat)
        return decoded(self.post_quant_conv, self.decoder, f_hat).contiguous().clamp_(-1, 1)

    @torch.no_grad()
    def img_to_idxBl(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the token maps of an image `[B, in_channels, H, W]` in [-1, 1], one `[B, p * p]` int64 per scale."""
        return self.quantize.tokens(self.img_to_features(image))

    @torch.no_grad()
    def idxBl_to_img(self, token_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the image `[B, in_channels, H, W]` in [-1, 1] of token maps, one `[B, p * p]` int64 per scale."""
        return self.fhat_to_img(self.quantize.features(token_maps))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Return reconstruction, token maps and quantization loss of an image `[B, in_channels, H, W]`, for training.

        The reconstruction `[B, in_channels, H, W]` is not clamped to [-1, 1].
        """
        f_hat, token_maps, loss = self.quantize(self.img_to_features(image))
        return decoded(self.post_quant_conv, self.decoder, f_hat), token_maps, loss

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter and buffer from `generator` alone."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.quantize.embedding.weight, std=0.5, generator=generator)
        self.quantize.ema_vocab_hit_SV.zero_()


@contextmanager
def without_decoder(module: Any, decode: str) -> Iterator[None]:
    """Let the method `decode` of `module` return its argument unchanged while the context is open."""
    with replaced(module, **{decode: lambda features: features}):
        yield
