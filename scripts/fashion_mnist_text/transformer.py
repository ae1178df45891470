"""Train the transformer with its word vectors: bits of garments from captions, some bits of the scales before wrong.

Wrong bits teach the model to correct its own, as in Infinity (Han et al., 2024): the bits to predict at a scale are
those of what is left of the image after the scales before, with their wrong bits.
"""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.infinity import Infinity
from actvar.models.infinity.schedules import Schedule
from actvar.models.infinity.tokenizer import resized
from actvar.text.words import WordEncoder
from actvar.zoo.fashion_mnist_text.architecture import SQUARE, WIDE
from scripts.fashion_mnist_text.captions import attributes, caption, caption_of_pair
from scripts.fashion_mnist_text.tokenizer import as_pairs, as_rgb

MOST_WRONG = 0.3
"""Largest share of wrong bits, which is drawn for each image."""


class TextTraining(nn.Module):
    """Loss of a transformer and of the vectors of the words that it reads.

    Args:
        infinity: is trained; its tokenizer is frozen.
        words: are trained.
        images, labels: `[N, 1, 32, 32]` in [0, 1] and their classes `[N]`.
    """

    def __init__(self, infinity: Infinity, words: WordEncoder, images: torch.Tensor, labels: torch.Tensor):
        super().__init__()
        self.var = infinity  # where the training loop looks for the blocks
        self.words = words
        self.images, self.labels, self.facts = images, labels.tolist(), attributes(images, labels).tolist()

    def forward(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses of images: three fifths alone, the others as pairs side by side.

        Args:
            index: numbers of images `[5 * n]`, which make `4 * n` examples, a quarter of them pairs.
        """
        rng = random.Random(int(torch.randint(2**31, ())))
        alone, paired = index.tensor_split([3 * len(index) // 5])
        captions = [caption(self.labels[i], self.facts[i], rng) for i in alone.tolist()]
        pairs = [(int(left), int(right)) for left, right in zip(*paired.chunk(2), strict=True)]
        of_pairs = [
            caption_of_pair((self.labels[a], self.labels[b]), (self.facts[a], self.facts[b]), rng) for a, b in pairs
        ]
        square = self.compared(self.images[alone], captions, SQUARE)
        wide = self.compared(as_pairs(self.images[paired]), of_pairs, WIDE)
        losses = torch.cat([square.flatten(), wide.flatten()])
        weights = [scale_weights(SQUARE).repeat(len(square)), scale_weights(WIDE).repeat(len(wide))]
        weights = torch.cat(weights)
        return {
            "loss": (weights * losses).sum() / weights.sum(),
            "square": square.detach().mean(),
            "wide": wide.detach().mean(),
            "last_scale": square.detach()[:, -(SQUARE[-1][1] ** 2) :].mean(),
            "first_scale": square.detach()[:, 0].mean(),
        }

    def compared(self, image: torch.Tensor, captions: list[str], schedule: Schedule) -> torch.Tensor:
        """Return the mean cross-entropy of the bits of every token, `[B, L]` in nats."""
        infinity = self.var
        with torch.no_grad():
            features = infinity.vae_proxy[0].encoder(as_rgb(image)).float()
            inputs, bits = corrupted(infinity, features, schedule)
        text, lengths = self.words(captions, infinity.text_maxlen)
        logits = infinity(text, lengths, inputs, schedule).float().unflatten(2, (-1, 2))
        return F.cross_entropy(logits.permute(0, 3, 1, 2), bits, reduction="none").mean(dim=2)


def corrupted(infinity: Infinity, features: torch.Tensor, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs for teacher forcing with wrong bits, and the bits to predict, `[B, L, bits]` int64.

    Args:
        infinity: the model that reads the inputs, `[B, L - 1, bits]`.
        features: of the tokenizer's encoder, `[B, bits, H, W]` float32.
        schedule: `(1, h, w)` of every scale.
    """
    quantizer = infinity.vae_proxy[0].quantizer.lfq
    share = MOST_WRONG * torch.rand(len(features), 1, 1, 1)
    total, inputs, wanted = torch.zeros_like(features), [], []
    for scale, (_, h, w) in enumerate(schedule):
        bits = quantizer.to_bits(F.adaptive_avg_pool2d(features - total, (h, w)))
        wanted.append(bits.flatten(1, 2).long())
        if scale + 1 < len(schedule):
            is_wrong = torch.rand(bits.shape) < share
            total = total + resized(quantizer.to_codes(bits ^ is_wrong), features.shape[2:])
            inputs.append(infinity.as_tokens(resized(total, schedule[scale + 1][1:])))
    return torch.cat(inputs, dim=1), torch.cat(wanted, dim=1)


def scale_weights(schedule: Schedule) -> torch.Tensor:
    """Return a weight for each token `[L]`, one over the height of its map, so that early tokens count for more."""
    return torch.cat([torch.full((h * w,), 1 / h) for _, h, w in schedule])
