"""Train the tokenizer: reconstruction of one garment and of two, through bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.infinity import InfinityTokenizer
from actvar.models.infinity.schedules import Schedule
from actvar.models.vqvae import VQVAE
from actvar.zoo.fashion_mnist.features import FeatureNet
from actvar.zoo.fashion_mnist_text.architecture import SQUARE, WIDE

COMMITMENT, PERCEPTUAL = 0.1, 0.3
"""Weights of the distance between features and their bits, and of the distance of a CNN's activations."""


class TokenizerTraining(nn.Module):
    """Loss of the tokenizer, whose rounding to bits passes gradients on as they are.

    Args:
        tokenizer: is trained.
        network: the CNN of the perceptual term, which is frozen; it is another one than FID is measured with.
    """

    def __init__(self, tokenizer: InfinityTokenizer, network: FeatureNet):
        super().__init__()
        self.tokenizer, self.network = tokenizer.requires_grad_(True), network.requires_grad_(False)

    def train(self, mode: bool = True) -> TokenizerTraining:
        """Keep the CNN in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses of images `[B, 1, 32, 32]` in [0, 1], in a quarter of the calls as pairs side by side."""
        is_wide = torch.rand(()) < 0.25
        return self.compared(as_pairs(image), WIDE) if is_wide else self.compared(image, SQUARE)

    def compared(self, image: torch.Tensor, schedule: Schedule) -> dict[str, torch.Tensor]:
        """Return the losses of images `[B, 1, H, W]` in [0, 1] of one schedule."""
        tokenizer = self.tokenizer
        features = tokenizer.encoder(as_rgb(image)).float()
        with torch.no_grad():
            bits = tokenizer.quantizer.bits_of(features, schedule)
            summed = tokenizer.quantizer.features_of(bits)
        decoded = tokenizer.decoder(features + (summed - features).detach()).float()
        reconstruction = decoded.mean(dim=1, keepdim=True) * 0.5 + 0.5
        commitment = tokenizer.bits * F.mse_loss(features, summed)
        absolute, square = F.l1_loss(decoded, as_rgb(image)), F.mse_loss(decoded, as_rgb(image))
        perceptual = self.perceptual(as_squares(reconstruction), as_squares(image))
        loss = absolute + square + PERCEPTUAL * perceptual + COMMITMENT * commitment
        last = bits[-1].float().mean(dim=(0, 1, 2))
        return {
            "loss": loss,
            "l1": absolute,
            "mse": square,
            "perceptual": perceptual,
            "commitment": commitment,
            "least_used_bit": torch.minimum(last, 1 - last).min(),
        }

    def perceptual(self, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return the distance of channel-normalised activations, of images `[B, 1, 32, 32]` in [0, 1]."""
        with torch.no_grad():
            stages = self.network.stages(wanted)
        return torch.stack(
            [
                (F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean()
                for a, b in zip(self.network.stages(image), stages, strict=True)
            ]
        ).sum()


@torch.no_grad()
def start_from(tokenizer: InfinityTokenizer, vae: VQVAE) -> None:
    """Copy the weights of an autoencoder of grey images that a tokenizer has layers for, its attention left out.

    Args:
        tokenizer: is changed; its convolutions from and to colours get the weights for grey by a third, and thrice.
        vae: an autoencoder of the same widths.
    """
    tensors = {f"{part}.{name}": tensor for part in ("encoder", "decoder") for name, tensor in _plain(vae, part)}
    for name, own in tokenizer.named_parameters():
        found = tensors.get(name)
        if found is None or found.shape[2:] != own.shape[2:]:
            continue
        if name.startswith("encoder.conv_in") and own.ndim == 4:
            found = found.expand_as(own) / own.shape[1]
        if name.startswith("decoder.conv_out"):
            found = found.expand_as(own)
        if found.shape == own.shape:
            own.copy_(found)


def _plain(vae: VQVAE, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the encoder or decoder of an autoencoder, by their names in a tokenizer."""
    module = getattr(vae, part)
    for name, layer in module.named_modules():
        inner = {nn.Conv2d: "conv", nn.GroupNorm: "norm"}.get(type(layer), "conv")
        if isinstance(layer, nn.Conv2d | nn.GroupNorm):
            for kind, tensor in layer.named_parameters():
                yield f"{name}.{inner}.{kind}", tensor


def as_rgb(image: torch.Tensor) -> torch.Tensor:
    """Return grey images `[B, 1, H, W]` in [0, 1] as `[B, 3, H, W]` in [-1, 1]."""
    return (image * 2 - 1).expand(-1, 3, -1, -1)


def as_pairs(image: torch.Tensor) -> torch.Tensor:
    """Return images `[B, 1, 32, 32]` as pairs side by side, `[B / 2, 1, 32, 64]`."""
    return torch.cat(image.chunk(2), dim=3)


def as_squares(image: torch.Tensor) -> torch.Tensor:
    """Return images `[B, 1, 32, W]` cut into squares, `[B * W / 32, 1, 32, 32]`."""
    return torch.cat(image.split(32, dim=3))
