"""VAR's convolutional autoencoder. State-dict keys follow the official `vae_ch160v4096z32.pth`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.quantizer import VectorQuantizer
from actvar.utils.plain_layers import is_plain
from actvar_kernels import add_residual, choose_fused, conv3x3, group_norm_silu
from actvar_kernels.backend import REFERENCE, Backend
from actvar_kernels.conv3x3.op import in_fast_format
from actvar_kernels.cpu_backend.memory import reused_memory
from actvar_kernels.cpu_backend.packing import drop_changed

OFFICIAL_CHANNEL_MULTIPLIERS = (1, 1, 2, 2, 4)
NORM_GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=NORM_GROUPS, num_channels=channels, eps=1e-6)


def _backend(x: torch.Tensor) -> Backend:
    """Return the backend whose kernels replace layers for an input like `x`, without gradients only."""
    return REFERENCE if torch.is_grad_enabled() else choose_fused(x)


def _fuses_residual(backend: Backend, *layers: nn.Module) -> bool:
    """Return whether kernels add biases and residuals between the convolutions, which takes plain layers."""
    return backend.fuses_residual and all(is_plain(layer, *_READ) for layer in layers)


def _norm_silu(norm: nn.GroupNorm, x: torch.Tensor, backend: Backend, silu: bool = True, **options) -> torch.Tensor:
    """Return `silu(norm(x))`; a norm that is more than its weight is called."""
    if backend.fuses and is_plain(norm, nn.GroupNorm):
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, **options)
    return F.silu(norm(x)) if silu else norm(x)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size of the image."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # kernels take channels in multiples of 16, and pack weights that stay
        if self.in_channels % 16 or "weight" not in self._parameters:
            return super().forward(x)
        return conv3x3(x, self.weight, self.bias)


_READ = (Conv3x3, nn.Conv2d, nn.GroupNorm, nn.Identity)


def _conv(
    conv: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None, enlarge: bool = False
) -> torch.Tensor:
    """Return `conv(x) + residual`, with `enlarge` of x in twice its size.

    A layer that is more than its weight is called.
    """
    if is_plain(conv, Conv3x3) and conv.in_channels % 16 == 0:
        return conv3x3(x, conv.weight, conv.bias, residual, enlarge)
    out = conv(F.interpolate(x, scale_factor=2, mode="nearest") if enlarge else x)
    return out if residual is None else residual + out


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        """Return the block of `x + offset`, with `offset` `[C]` the bias of the convolution before, where kernels run.

        There a bias is added by what comes next, since on its own it would be a pass over the convolution's output.
        """
        backend = _backend(x)
        if _fuses_residual(backend, self.norm1, self.conv1, self.norm2, self.conv2, self.nin_shortcut):
            h = conv3x3(_norm_silu(self.norm1, x, backend, offset=offset), self.conv1.weight, None)
            h = conv3x3(_norm_silu(self.norm2, h, backend, offset=self.conv1.bias), self.conv2.weight, None)
            shortcut, bias = self._shortcut(x, offset)
            return add_residual(shortcut, h, self.conv2.bias if bias is None else self.conv2.bias + bias)
        x = x if offset is None else x + offset.view(-1, 1, 1)
        h = _conv(self.conv1, _norm_silu(self.norm1, x, backend))
        return _conv(self.conv2, _norm_silu(self.norm2, h, backend, overwrite=True), residual=self.nin_shortcut(x))

    def _shortcut(self, x: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The shortcut of `x + offset` in two parts, the second one for every pixel, `[out_channels]`."""
        if isinstance(self.nin_shortcut, nn.Identity):
            return x, offset
        weight, bias = self.nin_shortcut.weight, self.nin_shortcut.bias
        if offset is not None:
            bias = bias + (weight.flatten(1) * offset).sum(dim=1)
        return F.conv2d(x, weight), bias


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        backend = _backend(x)
        q, k, v = self.qkv(_norm_silu(self.norm, x, backend, silu=False)).reshape(B, 3, C, H * W).unbind(1)
        weights = torch.bmm(q.transpose(1, 2), k).mul_(C**-0.5).softmax(dim=2)  # [B, query, key]
        h = torch.bmm(v, weights.transpose(1, 2)).view(B, C, H, W)
        if _fuses_residual(backend, self.proj_out):
            return add_residual(x, F.conv2d(_channels_last(h), self.proj_out.weight), self.proj_out.bias)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution without its bias, and this bias, where kernels run; else the convolution and None."""
        if _fuses_residual(_backend(x), self.conv):
            return conv3x3(twice_as_large(x), self.conv.weight, None), self.conv.bias
        return _conv(self.conv, x, enlarge=True), None


def twice_as_large(x: torch.Tensor) -> torch.Tensor:
    """`F.interpolate(x, scale_factor=2, mode="nearest")`, copied 16 bytes at a time where channels allow it, and also
    under autocast in x's dtype."""
    B, C, H, W = x.shape
    rows = _channels_last(x).permute(0, 2, 3, 1)
    for wide in (torch.complex128, torch.int64):
        if C * x.element_size() % wide.itemsize == 0:
            rows = rows.view(wide)
            break
    rows = rows[:, :, None, :, None].expand(B, H, 2, W, 2, rows.shape[3]).reshape(B, 2 * H, 2 * W, rows.shape[3])
    return rows.view(x.dtype).permute(0, 3, 1, 2)


class Level(nn.Module):
    """The residual blocks of one resolution, with attention after each at the lowest one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x = block(x, offset if i == 0 else None)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image `[B, in_channels, H, W]` -> features `[B, z_channels, H / f, W / f]`, `f = 2^(levels - 1)`."""

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
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(_norm_silu(self.norm_out, h, _backend(h), overwrite=True))


class Decoder(nn.Module):
    """Features `[B, z_channels, h, w]` -> image `[B, in_channels, h * f, w * f]`."""

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
        h, offset = self.mid(self.conv_in(z)), None
        for level in reversed(self.up):
            h = level(h, offset)
            if hasattr(level, "upsample"):
                h, offset = level.upsample(h)
        return self.conv_out(_norm_silu(self.norm_out, h, _backend(h), overwrite=True))


def _convolution_weights(*modules: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights that kernels keep packed copies of."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, Conv3x3) and layer._parameters.get("weight") is not None:
                yield layer._parameters["weight"]


class VQVAE(nn.Module):
    """Autoencoder with a multi-scale residual quantizer; images are in [-1, 1] inside.

    Args:
        vocab_size: codes in the codebook `V`.
        z_channels: code dimension `Cvae`.
        ch, ch_mult, num_res_blocks, in_channels: convolution width, its multiplier per resolution, residual blocks
            per resolution, image channels. The defaults are those of the official checkpoint.
        share_quant_resi: see `VectorQuantizer`.
        patch_nums: token map sides per scale.
    """

    def __init__(
        self,
        vocab_size: int,
        z_channels: int,
        ch: int,
        patch_nums: Sequence[int],
        share_quant_resi: int = 4,
        ch_mult: Sequence[int] = OFFICIAL_CHANNEL_MULTIPLIERS,
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ):
        super().__init__()
        self.vocab_size, self.Cvae, self.ch = vocab_size, z_channels, ch
        self.ch_mult, self.num_res_blocks, self.in_channels = tuple(ch_mult), num_res_blocks, in_channels
        self.downsample = 2 ** (len(ch_mult) - 1)
        sizes = dict(ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks)
        self.encoder = Encoder(**sizes, in_channels=in_channels, z_channels=z_channels)
        self.decoder = Decoder(**sizes, in_channels=in_channels, z_channels=z_channels)
        self.quantize = VectorQuantizer(vocab_size, z_channels, patch_nums, share_quant_resi)
        self.quant_conv = Conv3x3(z_channels, z_channels)
        self.post_quant_conv = Conv3x3(z_channels, z_channels)

    def fhat_to_img(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Decode quantized features `[B, Cvae, P, P]` to an image `[B, in_channels, H, W]` in [-1, 1]."""
        drop_changed(_convolution_weights(self.post_quant_conv, self.decoder))
        f_hat = in_fast_format(f_hat)
        with nullcontext() if torch.compiler.is_compiling() else reused_memory():
            return self.decoder(self.post_quant_conv(f_hat)).contiguous().clamp_(-1, 1)

    @torch.no_grad()
    def img_to_idxBl(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Token maps of an image `[B, in_channels, H, W]` in [-1, 1]: one `[B, p * p]` int64 tensor per scale."""
        drop_changed(_convolution_weights(self.encoder, self.quant_conv))
        image = _channels_last(image) if _fuses_residual(_backend(image)) else image
        return self.quantize.tokens(self.quant_conv(self.encoder(image)))

    @torch.no_grad()
    def idxBl_to_img(self, token_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Image `[B, in_channels, H, W]` in [-1, 1] of token maps, one `[B, p * p]` per scale."""
        return self.fhat_to_img(self.quantize.features(token_maps))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Training pass: reconstruction (not clamped), token maps, quantization loss."""
        f_hat, token_maps, loss = self.quantize(self.quant_conv(self.encoder(image)))
        return self.decoder(self.post_quant_conv(f_hat)), token_maps, loss

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every parameter and buffer from `generator` alone."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.quantize.embedding.weight, std=0.5, generator=generator)
        self.quantize.ema_vocab_hit_SV.zero_()


@contextmanager
def without_decoder(vae: nn.Module) -> Iterator[None]:
    """`vae.fhat_to_img` returns the features it is given while the context is open."""
    replaced = vae.__dict__.get("fhat_to_img")
    vae.fhat_to_img = lambda f_hat: f_hat
    try:
        yield
    finally:
        del vae.fhat_to_img
        if replaced is not None:
            vae.fhat_to_img = replaced
