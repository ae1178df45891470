"""Quantize an image's features as token maps from 1x1 up to the full grid, each the residual of those before.

Source: VAR (Tian et al., 2024), Algorithms 1 and 2. State-dict keys follow the official autoencoder checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from actvar.utils.plain_layers import is_plain
from actvar_kernels import add_codes, choose_fused, get_backend
from actvar_kernels.conv3x3.codes import MOST_CHANNELS
from actvar_kernels.cpu_backend.packing import once_on_gpu


class ResidualConv(nn.Conv2d):
    """Compute `phi(h) = (1 - ratio) * h + ratio * conv3x3(h)` for an upsampled token map `h` `[B, Cvae, P, P]`."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.mul(1 - self.ratio) + super().forward(h).mul(self.ratio)


def _ticks(count: int) -> np.ndarray:
    """Return the positions in [0, 1] of `count` convolutions, of which a scale uses the nearest.

    The constants are those of the public code.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    return np.linspace(margin, 1 - margin, count)


class SharedConv(nn.Module):
    """Share one convolution among all scales."""

    def __init__(self, conv: ResidualConv):
        super().__init__()
        self.qresi = conv

    def at(self, position: float) -> ResidualConv:
        """Return the convolution of a scale at `position` in [0, 1]."""
        return self.qresi


class PartiallySharedConvs(nn.Module):
    """Share each of a few convolutions among neighbouring scales."""

    def __init__(self, convs: Sequence[ResidualConv]):
        super().__init__()
        self.qresi_ls = nn.ModuleList(convs)

    def at(self, position: float) -> Any:
        """Return the convolution of a scale at `position` in [0, 1]."""
        return self.qresi_ls[int(np.abs(_ticks(len(self.qresi_ls)) - position).argmin())]


class SeparateConvs(nn.ModuleList):
    """Keep one convolution per scale."""

    def at(self, position: float) -> Any:
        """Return the convolution of a scale at `position` in [0, 1]."""
        return self[int(np.abs(_ticks(len(self)) - position).argmin())]


def uninitialised_embedding(count: int, size: int) -> nn.Embedding:
    """Return an `nn.Embedding` `[count, size]` without its initialisation.

    On the meta device the initialisation would import all of torch's compiler.
    """
    return nn.Embedding.from_pretrained(torch.empty(count, size), freeze=False)


def upsampled_by_axis(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Return `F.interpolate(maps, size=(side, side), mode="bicubic")`, computed along rows and then along columns.

    PyTorch's CUDA kernel has a thread for every pixel of one map, which loops over all maps; here all maps are joined
    to a single one. Interpolation leaves an axis of unchanged size as it is, so the sums are the same.

    Args:
        maps: `[B, C, p, p]` in a floating dtype.
        side: new height and width.
    """
    B, C, p, _ = maps.shape
    dtype = torch.promote_types(maps.dtype, torch.float32)
    rows = maps.to(dtype).reshape(1, 1, B * C * p, p)
    rows = F.interpolate(rows, size=(B * C * p, side), mode="bicubic")  # [maps, row, new column]
    columns = rows.view(B * C, p, side).transpose(1, 2).reshape(1, 1, B * C * side, p)
    columns = F.interpolate(columns, size=(B * C * side, side), mode="bicubic")  # [maps, new column, new row]
    return columns.view(B, C, side, side).transpose(2, 3).to(maps.dtype).contiguous()


def upsampled_by_products(codes: torch.Tensor, side: int, conv: ResidualConv, owner: torch.Tensor) -> torch.Tensor:
    """Return `conv` of the codes in a larger grid.

    It is a product with the weights of bicubic interpolation, and one convolution.

    Args:
        codes: `[B, C, p, p]` float32.
        side: side of the grid, p or more.
        conv: the convolution, which runs with its ratio in its weight.
        owner: any tensor of the quantizer, by which the weights of the interpolation are kept on a GPU.
    """
    B, C, p, _ = codes.shape

    def interpolation() -> torch.Tensor:
        """Return the share of every code in every cell of the grid, `[p * p, side * side]`."""
        each = torch.eye(p * p, dtype=codes.dtype, device=codes.device).view(p * p, 1, p, p)
        return F.interpolate(each, size=(side, side), mode="bicubic").flatten(1)

    def with_ratio() -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and the bias of `(1 - ratio) * h + ratio * conv3x3(h)`."""
        weight = conv.weight.detach() * conv.ratio
        weight[:, :, 1, 1] += (1 - conv.ratio) * torch.eye(C, dtype=weight.dtype, device=weight.device)
        return weight, None if conv.bias is None else conv.bias.detach() * conv.ratio

    if p != side:
        codes = codes.reshape(B * C, p * p) @ once_on_gpu((owner,), ("bicubic", p, side), interpolation)
    tensors = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    weight, bias = once_on_gpu(tensors, ("with ratio", conv.ratio), with_ratio)
    return F.conv2d(codes.reshape(B, C, side, side), weight, bias, padding=1)


class VectorQuantizer(nn.Module):
    """Map features to token maps and back, by a codebook `[V, Cvae]` and residual convolutions.

    Args:
        vocab_size: number of codes `V`.
        channels: code dimension `Cvae`.
        patch_nums: side length of every token map, ascending; the last is the feature grid's side.
        share_quant_resi: 0 for one convolution per scale, 1 for a single one, n > 1 for n partially shared ones.
    """

    ema_vocab_hit_SV: torch.Tensor

    def __init__(self, vocab_size: int, channels: int, patch_nums: Sequence[int], share_quant_resi: int = 4):
        super().__init__()
        self.vocab_size, self.Cvae, self.v_patch_nums = vocab_size, channels, tuple(patch_nums)
        self.beta = 0.25
        count = {0: len(self.v_patch_nums), 1: 1}.get(share_quant_resi, share_quant_resi)
        convs = [ResidualConv(channels, 0.5) for _ in range(count)]
        if share_quant_resi == 0:
            self.quant_resi = SeparateConvs(convs)
        elif share_quant_resi == 1:
            self.quant_resi = SharedConv(convs[0])
        else:
            self.quant_resi = PartiallySharedConvs(convs)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.embedding = uninitialised_embedding(vocab_size, channels)

    def upsampled(self, codes: torch.Tensor, scale: int) -> torch.Tensor:
        """Return the share of one scale's codes `[B, Cvae, p, p]` in the feature grid, `[B, Cvae, P, P]`."""
        last = len(self.v_patch_nums) - 1
        if scale != last:
            side = self.v_patch_nums[-1]
            if codes.is_cuda and not torch.is_grad_enabled():
                codes = upsampled_by_axis(codes, side)
            else:
                codes = F.interpolate(codes, size=(side, side), mode="bicubic")
        return self.quant_resi.at(scale / last)(codes)

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Return the index `[N]` int64 of the nearest code for each row of `features` `[N, Cvae]`.

        Distances are squared Euclidean ones.
        """
        weight = self.embedding.weight.detach()
        distance = features.square().sum(dim=1, keepdim=True) + weight.square().sum(dim=1)
        return distance.addmm_(features, weight.T, alpha=-2, beta=1).argmin(dim=1)

    def pooled_rows(self, rest: torch.Tensor, scale: int) -> torch.Tensor:
        """Return the residual `[B, Cvae, P, P]` averaged to the scale's grid, as rows `[B * p * p, Cvae]`."""
        side = self.v_patch_nums[scale]
        if scale != len(self.v_patch_nums) - 1:
            rest = F.interpolate(rest, size=(side, side), mode="area")
        return rest.permute(0, 2, 3, 1).reshape(-1, rest.shape[1])

    def code_map(self, tokens: torch.Tensor, side: int) -> torch.Tensor:
        """Return the code vectors `[B, Cvae, p, p]` of tokens `[B, p * p]` int64."""
        codes = self.embedding(tokens.view(tokens.shape[0], side, side))
        return codes.permute(0, 3, 1, 2).contiguous()

    def tokens(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Encode features `[B, Cvae, P, P]` greedily, and return one map `[B, p * p]` int64 per scale."""
        rest = features.detach().clone()
        token_maps = []
        for scale, side in enumerate(self.v_patch_nums):
            index = self.nearest(self.pooled_rows(rest, scale)).view(rest.shape[0], side * side)
            token_maps.append(index)
            rest -= self.upsampled(self.code_map(index, side), scale)
        return token_maps

    def features(self, token_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of all scales' upsampled codes, `[B, Cvae, P, P]`: the inverse of `tokens` up to quantization.

        Args:
            token_maps: one map `[B, p * p]` int64 per scale.
        """
        total: Any = 0
        for scale, (index, side) in enumerate(zip(token_maps, self.v_patch_nums, strict=True)):
            total = total + self.upsampled(self.code_map(index, side), scale)
        return total

    def teacher_input(self, token_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the transformer's input for teacher forcing, `[B, L - p_0^2, Cvae]` float32.

        At each position it is the partial sum of all coarser scales, averaged to the scale's grid.

        Args:
            token_maps: one map `[B, p * p]` int64 per scale.
        """
        batch, channels, full = token_maps[0].shape[0], self.Cvae, self.v_patch_nums[-1]
        partial = torch.zeros(batch, channels, full, full, dtype=torch.float32, device=token_maps[0].device)
        inputs = []
        for scale in range(len(self.v_patch_nums) - 1):
            codes = self.code_map(token_maps[scale], self.v_patch_nums[scale])
            partial, following = self.add_scale(scale, partial, codes)
            inputs.append(following.view(batch, channels, -1).transpose(1, 2))
        return torch.cat(inputs, dim=1)

    def add_scale(self, scale: int, partial: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one scale to the partial sum, in place.

        Args:
            scale: number of the scale.
            partial: the sum of the scales before, `[B, Cvae, P, P]`, changed in place.
            codes: code vectors of the scale, `[B, Cvae, p, p]`.

        Returns:
            the partial sum, and its average on the next scale's grid, which is the sum itself at the last scale.
        """
        partial.add_(self._added(codes, scale))
        if scale == len(self.v_patch_nums) - 1:
            return partial, partial
        side = self.v_patch_nums[scale + 1]
        return partial, F.interpolate(partial, size=(side, side), mode="area")

    def add_tokens(
        self, scale: int, partial: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the codes of one scale's tokens to the partial sum as `add_scale` does; on a GPU in three launches.

        Args:
            scale: number of the scale.
            partial: the sum of the scales before, `[B, Cvae, P, P]`, changed in place.
            tokens: of the scale, `[B, p * p]` int64.
            dtype: in which the average is read; it may come in a wider one.
        """
        last = len(self.v_patch_nums) - 1
        conv: Any = self.quant_resi.at(scale / last)
        if self._kernels_read(conv, partial):
            following = 0 if scale == last else self.v_patch_nums[scale + 1]
            weights = self.embedding.weight, conv.weight, conv.bias
            average = add_codes(partial, tokens, *weights, conv.ratio, following, dtype)
            return partial, average if following else partial
        side = self.v_patch_nums[scale]
        codes = self.embedding(tokens).transpose(1, 2).reshape(len(tokens), self.Cvae, side, side)
        return self.add_scale(scale, partial, codes)

    def _kernels_read(self, conv: Any, partial: torch.Tensor) -> bool:
        """Return whether kernels may add a scale: they run, and layers and `add_scale` are those of this file."""
        if (partial.is_cpu and get_backend() != "triton") or torch.is_grad_enabled() or self.Cvae > MOST_CHANNELS:
            return False
        if torch.is_autocast_enabled(partial.device.type) or not choose_fused(partial).fuses_residual:
            return False
        if "add_scale" in vars(self) or type(self).add_scale is not VectorQuantizer.add_scale:
            return False
        plain = is_plain(conv, ResidualConv) and is_plain(self.embedding, nn.Embedding) and conv.bias is not None
        return plain and conv.weight.dtype == self.embedding.weight.dtype == partial.dtype

    def _added(self, codes: torch.Tensor, scale: int) -> torch.Tensor:
        """Return `upsampled(codes, scale)`, on a GPU by two products in place of a dozen launches, to rounding."""
        conv = self.quant_resi.at(scale / (len(self.v_patch_nums) - 1))
        takes = codes.is_cuda and not torch.is_grad_enabled() and codes.dtype == conv.weight.dtype == torch.float32
        exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cuda")
        if takes and exact and not torch.compiler.is_compiling() and is_plain(conv, ResidualConv):
            return upsampled_by_products(codes, self.v_patch_nums[-1], conv, self.embedding.weight)
        return self.upsampled(codes, scale)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Quantize features for training, in float32.

        Args:
            features: `[B, Cvae, P, P]`.

        Returns:
            quantized features `[B, Cvae, P, P]` with a straight-through gradient, the token maps, and the scalar loss:
            the codebook term plus `beta` times the commitment term, averaged over scales.
        """
        features = features.float()
        target = features.detach()
        rest, total, token_maps = target.clone(), torch.zeros_like(target), []
        loss: Any = 0.0
        for scale, side in enumerate(self.v_patch_nums):
            index = self.nearest(self.pooled_rows(rest, scale)).view(rest.shape[0], side * side)
            token_maps.append(index)
            part = self.upsampled(self.code_map(index, side), scale)
            total = total + part
            rest = rest - part.detach()
            loss = loss + F.mse_loss(total.detach(), features) * self.beta + F.mse_loss(total, target)
        straight_through = total.detach() - target + features
        return straight_through, token_maps, loss / len(self.v_patch_nums)
