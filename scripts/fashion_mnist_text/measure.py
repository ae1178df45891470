"""Measure the shipped files, dense and by every preset: garments alone and in pairs, and the distance from dense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from actvar.config import DENSE
from actvar.evaluate.bundled import training_image_quality, training_lite0_quality
from actvar.evaluate.quality import network_features
from actvar.evaluate.text_predictions import DenseBits
from actvar.models import Infinity
from actvar.models.infinity import InfinityTokenizer
from actvar.models.infinity.schedules import Schedule
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import patched_silently
from actvar.sampling.text_request import TextSampling
from actvar.utils.files import replacing
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist.data import load_split
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE, WIDE
from actvar.zoo.fashion_mnist_text.prompts import NOUNS
from actvar.zoo.pretrained import TEXT_MODEL, bundled_presets, load_pretrained, load_text_encoder, preset_path
from scripts.fashion_mnist_text.tokenizer import as_rgb

AT_ONCE = 50
COMPARED = 200
"""Images along which bits are predicted."""


@torch.no_grad()
def measure(data: Path, samples: int) -> list[dict[str, float | str]]:
    """Return every figure of the model card, a row for the dense model on the kernels and one for each preset.

    Args:
        data: folder of the idx files.
        samples: images of one garment, whose prompts are the first names of the classes in turn, and a fifth as many
            pairs; each image has a seed of its own.

    Returns:
        of single garments FID to the training images by the bundled CNN and by EfficientNet-Lite0, precision, recall
        and the share in the wanted class (`agreement`); that share of the halves of pairs (`agreement_of_pairs`); the
        divergence `kl HxW` of the bits from the dense model's, in nats a token, of both kinds of images by the token
        map of the scale; and for the dense model the mean squared error of 2,000 test images after the tokenizer
        (`reconstruction_mse`).
    """
    tokenizer, infinity = load_pretrained(TEXT_MODEL)
    labels = torch.arange(samples) % len(NOUNS)
    pairs = torch.stack((labels, labels * 7 // 3 + 1), dim=1)[: samples // 5] % len(NOUNS)
    alone = requests([f"a {NOUNS[label][0]}" for label in labels], SQUARE)
    wide = requests([f"a {NOUNS[left][0]} and a {NOUNS[right][0]}" for left, right in pairs.tolist()], WIDE)
    quality, lite0 = training_image_quality(data), training_lite0_quality(data)
    bits = [DenseBits(infinity, of_kind[: COMPARED // AT_ONCE]) for of_kind in (alone, wide)]
    rows = []
    for name in progress(bundled_presets(TEXT_MODEL), desc="ways"):
        preset = preset_path(TEXT_MODEL, name)
        config = DENSE if preset is None else read_adapter_config(preset)
        with patched_silently(infinity, config, preset):
            images = drawn(infinity, alone)
            halves = torch.cat(drawn(infinity, wide).split(32, dim=3))
            distances = [of_kind.divergences(infinity)["kl_drawn"] for of_kind in bits]
        found = quality.network.classifier(network_features(quality.network, halves)).argmax(dim=1)
        rows.append(
            {
                "method": name if preset else "dense",
                "samples": samples,
                **quality.of(images, labels),
                **lite0.fid_of(images),
                "agreement_of_pairs": (found == torch.cat(pairs.unbind(1))).float().mean().item(),
                **{
                    f"kl {height}x{width}": kl
                    for schedule, by_scale in zip((SQUARE, WIDE), distances, strict=True)
                    for (_, height, width), kl in list(zip(schedule, by_scale, strict=True))[1:]
                },
            }
        )
    rows[0]["reconstruction_mse"] = reconstruction_error(tokenizer, data)
    return rows


def reconstruction_error(tokenizer: InfinityTokenizer, data: Path) -> float:
    """Return the mean squared error of 2,000 test images after the tokenizer, of brightness from 0 to 1."""
    test = load_split(data, "t10k")[0][:2000]
    decoded = [tokenizer.decode_bits(tokenizer.encode(as_rgb(some), SQUARE)) for some in test.split(AT_ONCE)]
    grey = torch.cat(decoded).mean(dim=1, keepdim=True) * 0.5 + 0.5
    return (grey - test).square().mean().item()


def requests(prompts: Sequence[str], schedule: Schedule) -> list[TextSampling]:
    """Return requests for an image of each prompt with its number as seed, some images in each request."""
    encoder, found = load_text_encoder(), []
    for start in range(0, len(prompts), AT_ONCE):
        some = tuple(prompts[start : start + AT_ONCE])
        text, lengths = encoder(some)
        found.append(
            TextSampling(
                some,
                tuple(range(len(some))),
                schedule,
                seed=tuple(range(start, start + len(some))),
                features=tuple(text.split(lengths)),
                **DRAW,
            )
        )
    return found


def drawn(infinity: Infinity, requested: Sequence[TextSampling]) -> torch.Tensor:
    """Return the grey images of requests, `[N, 1, H, W]` in [0, 1]."""
    images = [request.run(infinity) for request in progress(requested, desc="drawn", leave=False)]
    return torch.cat(images).mean(dim=1, keepdim=True)


def save(figures: list[dict[str, float | str]], path: Path) -> None:
    """Write the figures as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
