"""Measure the shipped files: how well garments are drawn, alone by two networks, and in pairs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from actvar.config import DENSE
from actvar.evaluate.bundled import training_image_quality, training_lite0_quality
from actvar.evaluate.quality import network_features
from actvar.models import Infinity
from actvar.models.infinity.schedules import Schedule
from actvar.patching.patch import patched_silently
from actvar.utils.files import replacing
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE, WIDE
from actvar.zoo.pretrained import TEXT_MODEL, load_pretrained, load_text_encoder
from scripts.fashion_mnist_text.captions import NOUNS
from scripts.fashion_mnist_text.tokenizer import as_rgb

AT_ONCE = 50


@torch.no_grad()
def measure(data: Path, samples: int) -> dict[str, float]:
    """Return every figure of the model card.

    Args:
        data: folder of the idx files.
        samples: images of one garment, whose prompts are the first names of the classes in turn, and a fifth as many
            pairs; each image has a seed of its own.

    Returns:
        of single garments FID to the training images by the bundled CNN and by EfficientNet-Lite0, precision, recall
        and the share in the wanted class (`agreement`); that share of the halves of pairs (`agreement_of_pairs`); and
        the mean squared error of 2,000 test images after the tokenizer (`reconstruction_mse`).
    """
    tokenizer, infinity = load_pretrained(TEXT_MODEL)
    with patched_silently(infinity, DENSE, None):
        labels = torch.arange(samples) % len(NOUNS)
        images = drawn(infinity, [f"a {NOUNS[label][0]}" for label in labels], SQUARE)
        pairs = torch.stack((labels, labels * 7 // 3 + 1), dim=1)[: samples // 5] % len(NOUNS)
        prompts = [f"a {NOUNS[left][0]} and a {NOUNS[right][0]}" for left, right in pairs.tolist()]
        wide = drawn(infinity, prompts, WIDE)
    quality, lite0 = training_image_quality(data), training_lite0_quality(data)
    halves = torch.cat(wide.split(32, dim=3))
    found = quality.network.classifier(network_features(quality.network, halves)).argmax(dim=1)
    test = load_split(data, "t10k")[0][:2000]
    reconstructed = torch.cat(
        [
            tokenizer.decode_bits(tokenizer.encode(as_rgb(some), SQUARE)).mean(dim=1, keepdim=True)
            for some in test.split(AT_ONCE)
        ]
    )
    return {
        "samples": samples,
        **quality.of(images, labels),
        "fid_lite0": lite0.of(images, lite0.dense_features(images, labels))["fid_lite0"],
        "agreement_of_pairs": (found == torch.cat(pairs.unbind(1))).float().mean().item(),
        "reconstruction_mse": (reconstructed * 0.5 + 0.5 - test).square().mean().item(),
    }


def drawn(infinity: Infinity, prompts: list[str], schedule: Schedule) -> torch.Tensor:
    """Return a grey image of each prompt, `[N, 1, H, W]` in [0, 1], drawn with its number as seed."""
    encoder, images = load_text_encoder(), []
    for start in progress(range(0, len(prompts), AT_ONCE), desc="drawn"):
        some = prompts[start : start + AT_ONCE]
        seeds = list(range(start, start + len(some)))
        images.append(infinity.sample(*encoder(some), schedule, g_seed=seeds, **DRAW).mean(dim=1, keepdim=True))
    return torch.cat(images)


def save(figures: dict[str, float], path: Path) -> None:
    """Write the figures as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
