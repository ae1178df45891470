"""The CNN whose penultimate layer measures image quality (FID) and whose prediction checks the class."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class FeatureNet(nn.Module):
    """Classifier of `[B, 1, 32, 32]` images in [0, 1]; `features` are its unnormalised 128 penultimate activations."""

    num_features = 128  # read by torchmetrics

    def __init__(self):
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        self.trunk = nn.Sequential(stage(1, 24), stage(24, 48), stage(48, 96))
        self.neck = nn.Linear(96 * 16, 128)
        self.classifier = nn.Linear(128, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features `[B, 128]` of images `[B, 1, 32, 32]` in [0, 1]."""
        return self.features_of(self.trunk(images))

    def features_of(self, last_stage: torch.Tensor) -> torch.Tensor:
        """Return the features `[B, 128]` of the last of `stages`, `[B, 96, 4, 4]`."""
        return F.relu(self.neck(last_stage.flatten(1)))

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the activations after each stage, `[B, 24, 16, 16]`, `[B, 48, 8, 8]` and `[B, 96, 4, 4]`."""
        activations = []
        for stage in self.trunk:
            images = stage(images)
            activations.append(images)
        return activations

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the class logits `[B, 10]` of images `[B, 1, 32, 32]` in [0, 1]."""
        return self.classifier(F.dropout(self.features(images), 0.3, self.training))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits in training, otherwise the features, of images `[B, 1, 32, 32]` in [0, 1]."""
        return self.logits(images) if self.training else self.features(images)


def training_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return cross-entropy and accuracy under random horizontal flips and shifts of up to 2 pixels.

    Args:
        model: a `FeatureNet` in training.
        images: `[B, 1, 32, 32]` float32 in [0, 1].
        labels: classes, `[B]` int64.
    """
    flip = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    logits = model(images.roll((dy, dx), dims=(2, 3)))
    loss = F.cross_entropy(logits.float(), labels)
    return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}
