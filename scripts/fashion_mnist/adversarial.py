"""The decoder's last training: against critics, on token maps of real images and on token maps that VAR draws.

The decoder so far knows token maps of real images alone. Those that are drawn differ: tokens of one scale are drawn
apart, and guidance prefers what is typical. Critics that see both teach it to make real-looking images of either.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from actvar.models.fused_vae import decoded
from actvar.models.vqvae import VQVAE
from actvar.zoo.fashion_mnist.data import CLASSES
from actvar.zoo.fashion_mnist.features import FeatureNet
from scripts.fashion_mnist.autoencoder import DecoderTraining

ADVERSARIAL, ANCHOR = 0.04, 0.05
"""Weights of the critics and of staying near the decoder as it was, on drawn token maps."""
WIDTH = 64
"""Channels of a critic."""
FEATURE_SIZE = 10.0
"""What features of the CNN are divided by, to be about as large as its other activations."""


class MapCritic(nn.Module):
    """How real activations `[B, C, side, side]` look to be of their classes `[B]`: scores `[B, 16]`.

    The class acts by projection (Miyato and Koyama 2018, arXiv 1802.05637); all weights have spectral norm 1.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        layers = [spectral_norm(nn.Conv2d(channels, WIDTH, 1)), nn.LeakyReLU(0.2)]
        while side > 4:
            layers += [spectral_norm(nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            side //= 2
        layers += [spectral_norm(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), nn.LeakyReLU(0.2)]
        self.body, self.projection = nn.Sequential(*layers), Projection(WIDTH)

    def forward(self, activations: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.projection(self.body(activations).flatten(2).transpose(1, 2), labels)


class VectorCritic(nn.Module):
    """The same of a vector of activations `[B, C]`: scores `[B, 1]`."""

    def __init__(self, channels: int):
        super().__init__()
        layers = [spectral_norm(nn.Linear(size, 2 * WIDTH)) for size in (channels, 2 * WIDTH)]
        self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(0.2))))
        self.projection = Projection(2 * WIDTH)

    def forward(self, activations: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.projection(self.body(activations).unsqueeze(1), labels)


class Projection(nn.Module):
    """Scores `[B, N]` of `[B, N, C]` for classes `[B]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.score = spectral_norm(nn.Linear(channels, 1))
        self.of_class = spectral_norm(nn.Embedding(len(CLASSES), channels))

    def forward(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.score(h).squeeze(2) + (h * self.of_class(labels).unsqueeze(1)).sum(dim=2)


class AdversarialTraining(nn.Module):
    """Loss of the decoder and of its critics, which see images and a frozen CNN's activations of them (projected GAN,
    Sauer et al. 2021, arXiv 2111.01007). That CNN is another one than the network FID is measured with.

    Args:
        vae: its decoder and `post_quant_conv` are trained, the rest is frozen.
        network: the CNN, which is frozen.
    """

    def __init__(self, vae: VQVAE, network: FeatureNet):
        super().__init__()
        self.reconstruction = DecoderTraining(vae, network)
        self.before = copy.deepcopy(nn.ModuleList([vae.post_quant_conv, vae.decoder])).requires_grad_(False)
        maps = [MapCritic(24, 16), MapCritic(48, 8), MapCritic(96, 4), MapCritic(1, 32)]
        self.critics = nn.ModuleList([*maps, VectorCritic(network.num_features)])

    def scores(self, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Every critic's, of images `[B, 1, 32, 32]` in [0, 1]."""
        network = self.reconstruction.network
        stages = network.stages(images)
        activations = [*stages, images, network.features_of(stages[-1]) / FEATURE_SIZE]
        return [critic(of_it, labels) for critic, of_it in zip(self.critics, activations, strict=True)]

    def forward(
        self,
        token_maps: Sequence[torch.Tensor],
        image: torch.Tensor,
        label: torch.Tensor,
        drawn: Sequence[torch.Tensor],
        drawn_label: torch.Tensor,
        other_image: torch.Tensor,
        other_label: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Hinge losses of critics and decoder, and those of the reconstruction.

        Args:
            token_maps, image, label: one `[B, p * p]` per scale, their images `[B, 1, 32, 32]` in [0, 1] and classes.
            drawn, drawn_label: as many token maps that were drawn, and their classes.
            other_image, other_label: as many real images for the critics.
        """
        vae, old_conv, old_decoder = self.reconstruction.vae, *self.before
        losses, reconstructed = self.reconstruction.compared(token_maps, image)
        features = vae.quantize.features(drawn)
        painted = self.reconstruction.decoded(features)
        made, made_label = torch.cat([reconstructed, painted]), torch.cat([label, drawn_label])

        real = self.scores(torch.cat([image, other_image]), torch.cat([label, other_label]))
        fake = self.scores(made.detach(), made_label)
        critics = sum(
            F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)
        )
        with frozen(self.critics):
            fooled = -sum(score.float().mean() for score in self.scores(made, made_label))
        with torch.no_grad():
            as_before = decoded(old_conv, old_decoder, features).float() * 0.5 + 0.5
        moved = F.l1_loss(painted, as_before)

        loss = losses["loss"] + ANCHOR * moved + ADVERSARIAL * fooled + critics
        return losses | {"loss": loss, "moved": moved, "fooled": fooled, "critics": critics}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, no gradient goes to the parameters of `module`."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
