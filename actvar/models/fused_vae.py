"""Run the modules of `actvar.models.basic_vae` by the operations of `actvar_kernels`.

`encoded` and `decoded` choose once per call whether kernels run. PyTorch computes a module that is more than its class
and its weight (hooks, LoRA, parametrisations, quantised weights), and kernels compute the rest.

Modules are annotated `Any`: another module may stand in the place of any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.basic_vae import (
    AttnBlock,
    Conv3x3,
    Decoder,
    Encoder,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
    pixel_attention,
)
from actvar.utils.modes import no_grad
from actvar.utils.plain_layers import is_plain
from actvar_kernels import (
    BackendUnavailableError,
    add_residual,
    add_residual_moments,
    choose_fused,
    conv3x3,
    group_norm_silu,
)
from actvar_kernels.backend import get_backend
from actvar_kernels.conv3x3 import gpu
from actvar_kernels.conv3x3.gpu import conv1x1
from actvar_kernels.cpu_backend.memory import reused_memory
from actvar_kernels.cpu_backend.packing import drop_changed, packed
from actvar_kernels.situation import wants_gradient


def decoded(conv: Any, decoder: Any, features: torch.Tensor) -> torch.Tensor:
    """Return `decoder(conv(features))`, by kernels where they run and no gradient is wanted.

    Args:
        conv: the autoencoder's `post_quant_conv`.
        decoder: the autoencoder's `decoder`.
        features: `[B, z_channels, h, w]`.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    fused = fused_for(features, conv, decoder)
    return decoder(conv(features)) if fused is None else _decoded(fused, conv, decoder, features)


def encoded(encoder: Any, conv: Any, image: torch.Tensor) -> torch.Tensor:
    """Return `conv(encoder(image))`, by kernels where they run and no gradient is wanted.

    Args:
        encoder: the autoencoder's `encoder`.
        conv: the autoencoder's `quant_conv`.
        image: `[B, in_channels, H, W]`.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    fused = fused_for(image, encoder, conv)
    return conv(encoder(image)) if fused is None else _encoded(fused, encoder, conv, image)


def fused_for(x: torch.Tensor, *modules: nn.Module) -> Fused | None:
    """Return what computes `modules` by kernels, or None where PyTorch computes them.

    Args:
        x: the input `[B, C, H, W]`.
        modules: the modules that follow each other.

    Raises:
        BackendUnavailableError: a backend was asked for by name and cannot run.
    """
    by_name = get_backend() == "cpu"  # its operations raise where they cannot run
    if torch.is_grad_enabled() and wants_gradient(x, *(p for module in modules for p in module.parameters())):
        if by_name:
            raise BackendUnavailableError("the 'cpu' backend has no gradient of the autoencoder; use 'auto'")
        return None
    backend = no_grad(choose_fused)(x)
    return Fused(backend.fuses_residual, backend.packs_weights) if by_name or backend.fuses else None


@no_grad
def _decoded(fused: Fused, conv: Any, decoder: Any, features: torch.Tensor) -> torch.Tensor:
    """Return `decoder(conv(features))` by kernels."""
    drop_changed(_packed_weights(conv, decoder))
    with nullcontext() if torch.compiler.is_compiling() else reused_memory():
        return fused.decoder(decoder, fused.conv(conv, channels_last(features)))


@no_grad
def _encoded(fused: Fused, encoder: Any, conv: Any, image: torch.Tensor) -> torch.Tensor:
    """Return `conv(encoder(image))` by kernels."""
    drop_changed(_packed_weights(encoder, conv))
    return fused.conv(conv, fused.encoder(encoder, channels_last(image) if fused.on_triton else image))


def _packed_weights(*modules: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights that kernels keep packed copies of."""
    for module in modules:
        for layer in module.modules():
            weight = layer._parameters.get("weight") if isinstance(layer, Conv3x3) else None
            if weight is not None:
                yield weight


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return `x` `[B, C, H, W]` in the memory format `channels_last`."""
    return x.contiguous(memory_format=torch.channels_last)


class Map(NamedTuple):
    """Hold a feature map and what is known of it.

    Attributes:
        x: `[B, C, H, W]`.
        offset: `[C]`, a bias that is still to be added, or None.
        moments: those of x that `add_residual_moments` or a convolution gave, or None.
        part: positions of a part of a convolution's moments, or None.
    """

    x: torch.Tensor
    offset: torch.Tensor | None = None
    moments: torch.Tensor | None = None
    part: int | None = None

    def sum(self) -> torch.Tensor:
        """Return the map with its offset, `[B, C, H, W]`."""
        return self.x if self.offset is None else self.x + self.offset.view(-1, 1, 1)


class Fused(NamedTuple):
    """Compute modules of `actvar.models.basic_vae` by kernels; every method takes the module and its input.

    On Triton the convolutions are PyTorch's unless a measured table says otherwise, and the operations between them are
    fused. The operation after a
    convolution adds the convolution's bias, which would otherwise need a pass of its own. The launch that adds a
    residual also measures the sum for the norm that follows.

    Args:
        on_triton: whether kernels run on Triton.
        in_cpp: whether kernels run in C++.
    """

    on_triton: bool
    in_cpp: bool

    def decoder(self, decoder: Any, z: torch.Tensor) -> torch.Tensor:
        """Return the image `[B, in_channels, H, W]` of features `z` `[B, z_channels, h, w]`."""
        if not is_plain(decoder, Decoder):
            return decoder(z)
        h = self.middle(decoder.mid, Map(self.conv(decoder.conv_in, z)))
        for level in reversed(decoder.up):
            enlarges = hasattr(level, "upsample")
            h = self.level(level, h, norm_follows=not enlarges)
            if enlarges:
                h = self.upsample(level.upsample, h.x)
        return self.conv(decoder.conv_out, self.norm_silu(decoder.norm_out, h, overwrite=True))

    def encoder(self, encoder: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the features `[B, z_channels, h, w]` of an image `x` `[B, in_channels, H, W]`."""
        if not is_plain(encoder, Encoder):
            return encoder(x)
        h = Map(self.conv(encoder.conv_in, x))
        for level in encoder.down:
            shrinks = hasattr(level, "downsample")
            h = self.level(level, h, norm_follows=not shrinks)
            if shrinks:
                h = Map(level.downsample(h.x))
        h = self.middle(encoder.mid, h)
        return self.conv(encoder.conv_out, self.norm_silu(encoder.norm_out, h, overwrite=True))

    def level(self, level: Any, h: Map, norm_follows: bool) -> Map:
        """Return `level` of a feature map `[B, C, H, W]`; `norm_follows` says whether a norm reads the result."""
        if not is_plain(level, Level):
            return Map(level(h.sum()))
        for i, block in enumerate(level.block):
            is_last = i == len(level.block) - 1
            h = self.resnet(block, h, norm_follows or len(level.attn) > 0 or not is_last)
            if len(level.attn):
                h = self.attention(level.attn[i], h, norm_follows or not is_last)
        return h

    def middle(self, middle: Any, h: Map) -> Map:
        """Return `middle` of a feature map `[B, C, H, W]`."""
        if not is_plain(middle, Middle):
            return Map(middle(h.sum()))
        return self.resnet(middle.block_2, self.attention(middle.attn_1, self.resnet(middle.block_1, h)))

    def resnet(self, block: Any, h: Map, norm_follows: bool = True) -> Map:
        """Return `block` of a feature map `[B, in_channels, H, W]`; `norm_follows` is that of `level`."""
        if not is_plain(block, ResnetBlock):
            return Map(block(h.sum()))
        if self._reads(block.norm1, block.conv1, block.norm2, block.conv2, block.nin_shortcut):
            update = conv3x3(self.norm_silu(block.norm1, h), block.conv1.weight, None)
            update = self.norm_silu(block.norm2, Map(update, block.conv1.bias))
            shortcut, bias = _shortcut(block.nin_shortcut, h.x, h.offset)
            bias = block.conv2.bias if bias is None else _sum_of_biases(h.x, block.conv2.bias, bias)
            measured = gpu.conv3x3_measured(update, block.conv2.weight, bias, shortcut) if norm_follows else None
            if measured is not None:
                return Map(measured.x, moments=measured.moments, part=measured.part)
            return _added(shortcut, conv3x3(update, block.conv2.weight, None), bias, norm_follows)
        x = h.sum()
        update = self.conv(block.conv1, self.norm_silu(block.norm1, Map(x)))
        update = self.norm_silu(block.norm2, Map(update), overwrite=True)
        return Map(self.conv(block.conv2, update, residual=block.nin_shortcut(x)))

    def attention(self, block: Any, h: Map, norm_follows: bool = True) -> Map:
        """Return `block` of a feature map `[B, C, H, W]` without an offset; `norm_follows` is that of `level`."""
        if not is_plain(block, AttnBlock):
            return Map(block(h.x))
        u = self.norm_silu(block.norm, h, silu=False)
        qkv = conv1x1(u, block.qkv.weight, block.qkv.bias) if self._reads(block.qkv) else block.qkv(u)
        update = pixel_attention(qkv)
        if self._reads(block.proj_out):
            update = conv1x1(channels_last(update), block.proj_out.weight)
            return _added(h.x, update, block.proj_out.bias, norm_follows)
        return Map(h.x + block.proj_out(update))

    def upsample(self, module: Any, x: torch.Tensor) -> Map:
        """Return `module(x)` `[B, C, 2H, 2W]`, on Triton with the bias as offset."""
        if not is_plain(module, Upsample):
            return Map(module(x))
        if self._reads(module.conv):
            return Map(conv3x3(x, module.conv.weight, None, enlarge=True), module.conv.bias)
        return Map(self.conv(module.conv, x, enlarge=True))

    def conv(
        self, conv: Any, x: torch.Tensor, residual: torch.Tensor | None = None, enlarge: bool = False
    ) -> torch.Tensor:
        """Return `conv(x) + residual`.

        Args:
            conv: a convolution.
            x: `[B, in_channels, H, W]`.
            residual: `[B, out_channels, H', W']` in the size of the output, or None.
            enlarge: whether x is doubled in height and width first.
        """
        if is_plain(conv, Conv3x3) and conv.in_channels % 16 == 0:  # the kernel takes no other widths
            return conv3x3(x, conv.weight, conv.bias, residual, enlarge)
        out = conv(F.interpolate(x, scale_factor=2, mode="nearest") if enlarge else x)
        return out if residual is None else residual + out

    def norm_silu(self, norm: Any, h: Map, silu: bool = True, overwrite: bool = False) -> torch.Tensor:
        """Return `silu(norm(h))` `[B, C, H, W]`, or `norm(h)` if `silu` is False.

        Args:
            norm: a norm of channels.
            h: a feature map; one with an offset on Triton alone.
            silu: whether SiLU follows.
            overwrite: as in `group_norm_silu`.
        """
        if (self.on_triton or self.in_cpp) and is_plain(norm, nn.GroupNorm):
            layer = norm.weight, norm.bias, norm.num_groups, norm.eps
            return group_norm_silu(
                h.x, *layer, silu=silu, offset=h.offset, overwrite=overwrite, moments=h.moments, part=h.part
            )
        x = h.sum()
        return F.silu(norm(x)) if silu else norm(x)

    def _reads(self, *layers: nn.Module) -> bool:
        """Return whether Triton runs and may read all `layers`."""
        known = (Conv3x3, nn.Conv2d, nn.GroupNorm, nn.Identity)
        return self.on_triton and all(is_plain(layer, *known) for layer in layers)


def _added(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor, norm_follows: bool) -> Map:
    """Return `x + update + bias`, measured for the norm that follows; both maps are `[B, C, H, W]`, the bias `[C]`."""
    if not norm_follows:
        return Map(add_residual(x, update, bias))
    out, moments = add_residual_moments(x, update, bias)
    return Map(out, moments=moments)


def _sum_of_biases(x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sum of two biases `[C]`, on a GPU one that is kept."""
    return packed((one, other), "sum", lambda: one + other) if gpu.takes(x) else one + other


def _shortcut(conv: Any, x: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a feature map and a bias `[out_channels]` or None, whose sum is `conv(x + offset)`."""
    if isinstance(conv, nn.Identity):
        return x, offset
    bias = conv.bias
    if offset is not None:

        def with_offset() -> torch.Tensor:
            """Return the bias with what the convolution makes of the offset."""
            return conv.bias + (conv.weight.flatten(1) * offset).sum(dim=1)

        on_gpu = gpu.takes(x)  # where copies are kept
        bias = packed((conv.weight, conv.bias, offset), "bias with offset", with_offset) if on_gpu else with_offset()
    return conv1x1(x, conv.weight), bias
