"""Define encoder and decoder of Infinity's tokenizer; state-dict keys follow the official `infinity_vae_d32reg.pth`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.basic_vae import NORM_GROUPS


class Conv(nn.Module):
    """Hold a convolution as `conv`, as the official keys have it; a 3x3 one of stride 1 keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Norm(nn.Module):
    """Hold the norm of a feature map `[B, channels, H, W]` as `norm`, as the official keys have it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class ResnetBlock(nn.Module):
    """Add two convolutions, each after a norm and SiLU, to their input `[B, in_channels, H, W]`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(in_channels), Conv(in_channels, out_channels)
        self.norm2, self.conv2 = Norm(out_channels), Conv(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Conv(in_channels, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Downsample(nn.Module):
    """Halve height and width of a feature map `[B, channels, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width of a feature map `[B, channels, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Run the residual blocks of one resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise([in_channels] + [out_channels] * num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return x


class Middle(nn.Module):
    """Run two residual blocks at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Map images `[B, 3, H, W]` to features `[B, bits, H / f, W / f]`, where f is `2^(levels - 1)`."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, bits: int):
        super().__init__()
        self.conv_in = Conv(3, ch)
        widths, last = [ch] + [ch * m for m in ch_mult], len(ch_mult) - 1
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], num_res_blocks)
            if i != last:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv(widths[-1], bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        level: Any  # only some have `downsample`
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Map features `[B, bits, h, w]` to images `[B, 3, h * f, w * f]`, where f is `2^(levels - 1)`."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, bits: int):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = Conv(bits, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[min(i + 1, last)], widths[i], num_res_blocks + 1)
            if i != 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = Norm(widths[0])
        self.conv_out = Conv(widths[0], 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        level: Any  # only some have `upsample`
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
