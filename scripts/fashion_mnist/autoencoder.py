"""Training of the bundled autoencoder: reconstruction, quantization loss, and new life for dead codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from actvar.models.fused_vae import decoded
from actvar.models.vqvae import VQVAE
from actvar.training.processes import rank, world_size
from actvar.zoo.fashion_mnist.features import FeatureNet


class AutoencoderTraining:
    """Loss of a batch, and the restart of codes that no token used over the last `window` steps (counts start afresh
    when a run is resumed)."""

    window = 100

    def __init__(self, vae: VQVAE, images: torch.Tensor):
        self.vae, self.images = vae, images
        self.hits = torch.zeros(vae.vocab_size)
        self.latest = images[:1]

    def loss(self, model: nn.Module, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        image = self.images[indices] * 2 - 1
        self.latest = image
        reconstruction, token_maps, quantization = model(image)
        self.hits += torch.bincount(torch.cat(token_maps, dim=1).flatten(), minlength=len(self.hits))
        absolute, square = F.l1_loss(reconstruction.float(), image), F.mse_loss(reconstruction.float(), image)
        return {"loss": absolute + square + quantization, "l1": absolute, "mse": square, "vq": quantization}

    @torch.no_grad()
    def restart_dead_codes(self, step: int) -> None:
        """Move unused codes onto residuals of the latest batch; every process gets the same codebook."""
        if (step + 1) % self.window:
            return
        if world_size() > 1:
            dist.all_reduce(self.hits)
        dead = (self.hits < 1).nonzero().flatten()
        self.hits.zero_()
        weight = self.vae.quantize.embedding.weight
        if rank() == 0 and len(dead):
            rows = residual_rows(self.vae, self.latest)
            weight[dead] = rows[torch.randint(len(rows), (len(dead),))]
        if world_size() > 1:
            dist.broadcast(weight, src=0)


class DecoderTraining(nn.Module):
    """Loss of the decoder alone, on the features of given token maps, so that the tokens keep their meaning.

    Beside the absolute and squared error it has a perceptual term: the distance of channel-normalised activations of a
    CNN. That CNN is another one than the network FID is measured with.
    """

    def __init__(self, vae: VQVAE, network: FeatureNet):
        super().__init__()
        self.vae, self.network = vae.requires_grad_(False), network.requires_grad_(False)
        self.vae.decoder.requires_grad_(True)
        self.vae.post_quant_conv.requires_grad_(True)

    def train(self, mode: bool = True) -> DecoderTraining:
        """The CNN stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, token_maps: Sequence[torch.Tensor], image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Token maps, one `[B, p * p]` per scale, and their images `[B, 1, 32, 32]` in [0, 1]."""
        return self.compared(token_maps, image)[0]

    def compared(
        self, token_maps: Sequence[torch.Tensor], image: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses, and the reconstruction, which is not clamped."""
        reconstruction = self.decoded(self.vae.quantize.features(token_maps))
        with torch.no_grad():
            wanted = self.network.stages(image)
        perceptual = sum(
            (F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean()
            for a, b in zip(self.network.stages(reconstruction), wanted, strict=True)
        )
        absolute, square = F.l1_loss(reconstruction, image), F.mse_loss(reconstruction, image)
        loss = absolute + square + 0.3 * perceptual
        return {"loss": loss, "l1": absolute, "mse": square, "perceptual": perceptual}, reconstruction

    def decoded(self, features: torch.Tensor) -> torch.Tensor:
        """Return images `[B, 1, 32, 32]`, in [0, 1] but not clamped, of features `[B, Cvae, 8, 8]`."""
        return decoded(self.vae.post_quant_conv, self.vae.decoder, features).float() * 0.5 + 0.5


def residual_rows(vae: VQVAE, image: torch.Tensor) -> torch.Tensor:
    """Return what the codebook is asked to represent: pooled residuals of all scales, `[N, Cvae]`."""
    quantizer = vae.quantize
    rest = vae.img_to_features(image).float()
    rows = []
    for scale, side in enumerate(quantizer.v_patch_nums):
        pooled = quantizer.pooled_rows(rest, scale)
        rows.append(pooled)
        index = quantizer.nearest(pooled).view(rest.shape[0], side * side)
        rest = rest - quantizer.upsampled(quantizer.code_map(index, side), scale)
    return torch.cat(rows)
