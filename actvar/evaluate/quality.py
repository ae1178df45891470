"""Image quality by the features of a frozen network: Frechet distance, and agreement with the wanted class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm


class FrechetDistance:
    """FID against one set of real images, whose statistics are computed once.

    Args:
        network: maps images to features `[B, network.num_features]`.
        real: batches `[B, *image_shape]` in [0, 1].
        image_shape: channels, height, width.
    """

    def __init__(self, network: nn.Module, real: Iterable[torch.Tensor], image_shape: tuple[int, int, int]):
        self.metric = FrechetInceptionDistance(
            feature=network, normalize=True, input_img_size=image_shape, reset_real_features=False
        )
        for images in real:
            self.metric.update(images, real=True)

    def to(self, generated: Iterable[torch.Tensor]) -> float:
        """FID of `generated`, batches like the real ones."""
        self.metric.reset()
        for images in generated:
            self.metric.update(images, real=False)
        return self.metric.compute().item()


def sample_classes(
    var: nn.Module, count: int, batch: int, num_classes: int, seed: int = 0, cfg: float = 1.5, **sampling
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` images with classes in turn, as batches of (images `[B, C, H, W]` in [0, 1], labels `[B]`).

    `sampling` is passed on to `autoregressive_infer_cfg`; batch `i` is drawn with seed `seed + i`.
    """
    labels = torch.arange(count) % num_classes
    for index, of_batch in enumerate(tqdm(labels.split(batch), desc="sampling")):
        images = var.autoregressive_infer_cfg(len(of_batch), of_batch, g_seed=seed + index, cfg=cfg, **sampling)
        yield images, of_batch
