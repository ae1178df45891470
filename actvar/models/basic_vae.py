"""Define encoder and decoder of VAR's convolutional autoencoder, in plain PyTorch.

State-dict keys follow the official `vae_ch160v4096z32.pth`. `actvar.models.fused_vae` computes the same by kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NORM_GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    """Return the norm of a feature map `[B, channels, H, W]`."""
    return nn.GroupNorm(num_groups=NORM_GROUPS, num_channels=channels, eps=1e-6)


class Conv3x3(nn.Conv2d):
    """Convolve a feature map by 3x3 without a change of height and width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """Add two convolutions, each after a norm and SiLU, to their input `[B, in_channels, H, W]`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Add single-head self-attention over the pixels to a feature map `[B, channels, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.proj_out(pixel_attention(self.qkv(self.norm(x))))


def pixel_attention(qkv: torch.Tensor) -> torch.Tensor:
    """Return the attention `[B, C, H, W]` of every pixel to all pixels, from `qkv` `[B, 3 * C, H, W]`."""
    B, _, H, W = qkv.shape
    q, k, v = qkv.reshape(B, 3, -1, H * W).unbind(1)
    weights = torch.bmm(q.transpose(1, 2), k).mul_(q.shape[1] ** -0.5).softmax(dim=2)  # [B, query, key]
    return torch.bmm(v, weights.transpose(1, 2)).view(B, -1, H, W)


class Downsample(nn.Module):
    """Halve height and width of a feature map `[B, channels, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width of a feature map `[B, channels, H, W]`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Run the residual blocks of one resolution, with attention after each at the lowest resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Run two residual blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Map images `[B, in_channels, H, W]` to features `[B, z_channels, H / f, W / f]`, where f is `2^(levels - 1)`."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int):
        super().__init__()
        self.conv_in = Conv3x3(in_channels, ch)
        widths, last = [ch] + [ch * m for m in ch_mult], len(ch_mult) - 1
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], num_res_blocks, attention=i == last)
            if i != last:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = Conv3x3(widths[-1], z_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        level: Any  # only some have `downsample`
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Map features `[B, z_channels, h, w]` to images `[B, in_channels, h * f, w * f]`, where f is `2^(levels - 1)`."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = Conv3x3(z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        levels = []
        for i in range(len(ch_mult)):
            level = Level(widths[min(i + 1, last)], widths[i], num_res_blocks + 1, attention=i == last)
            if i != 0:
                level.upsample = Upsample(widths[i])
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(widths[0])
        self.conv_out = Conv3x3(widths[0], in_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z))
        level: Any  # only some have `upsample`
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
