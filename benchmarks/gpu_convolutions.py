"""Time every convolution of the official decoder by shape on a GPU: cuDNN's, this package's kernel, enlarged maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.models.basic_vae import Upsample
from actvar.models.build import OFFICIAL_CHANNEL_MULTIPLIERS
from actvar.models.vqvae import VQVAE
from actvar_kernels import add_residual_moments
from actvar_kernels.conv3x3 import gpu, triton_kernel
from actvar_kernels.operations.shapes import SIZES
from actvar_kernels.triton_backend.conv_tiles import ConvTiles, candidates
from actvar_kernels.triton_backend.tiles import architecture


class Layer(NamedTuple):
    """Describe a convolution: channels, side of its output, kernel, and whether its input is enlarged."""

    inputs: int
    outputs: int
    side: int
    kernel: int
    enlarges: bool = False

    @property
    def flops(self) -> int:
        """Return the FLOPs of one image, those of an enlarged map as a convolution of 3x3."""
        return 2 * self.inputs * self.outputs * (self.kernel * self.side) ** 2


def decoder_layers(model: str = "d16") -> Counter[Layer]:
    """Return how often each layer stands in the official decoder, for maps of the size of `model`."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        vae = VQVAE(4096, 32, 160, SIZES[model].sides, ch_mult=OFFICIAL_CHANNEL_MULTIPLIERS)
        side = SIZES[model].sides[-1]
        enlarging = {id(module.conv) for module in vae.decoder.modules() if isinstance(module, Upsample)}

        def note(conv: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            sizes = conv.in_channels, conv.out_channels, output.shape[-1], conv.kernel_size[0]
            found[Layer(*sizes, enlarges=id(conv) in enlarging)] += 1

        layers = [vae.post_quant_conv, *(m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d))]
        handles = [layer.register_forward_hook(note) for layer in layers]
        vae.decoder(vae.post_quant_conv(torch.empty(1, 32, side, side)))
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def convolutions(batches: list[int]) -> Iterator[dict]:
    """Yield milliseconds and TFLOP/s of every layer in bfloat16, with cuDNN's heuristics and with its benchmark."""
    for batch in batches:
        for layer, count in decoder_layers().items():
            for name, run in ways(layer, batch).items():
                for benchmark in (False, True):
                    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, benchmark
                    try:
                        milliseconds = time_in_graph(run)
                    finally:
                        torch.backends.cudnn.benchmark = before
                    yield {
                        **layer._asdict(),
                        "batch": batch,
                        "count": count,
                        "way": name,
                        "cudnn_benchmark": benchmark,
                        "ms": milliseconds,
                        "tflops_of_3x3": batch * layer.flops / milliseconds[1] / 1e9,
                    }


def ways(layer: Layer, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return calls of a layer in bfloat16 by the way they convolve; results are equal to rounding."""
    side = layer.side // 2 if layer.enlarges else layer.side
    x = torch.randn(batch, layer.inputs, side, side, device="cuda").bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel, device="cuda").bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last)
    if layer.kernel == 1:
        return {"conv2d": lambda: gpu.conv1x1(x, weight)}
    if not layer.enlarges:
        return {"conv2d": lambda: gpu.conv3x3(x, weight, None, enlarge=False), **own_ways(x, weight)}
    phases = four_pixels(weight)
    return {
        "transposed": lambda: gpu.conv3x3(x, weight, None, enlarge=True),
        "enlarged copy": lambda: F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1),
        "2x2 without shuffle": lambda: F.conv2d(x, phases, padding=1),
    }


def own_ways(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return calls of this package's kernel with each of its tiles; with a residual where the widths are equal.

    A residual is added and measured, for which `conv2d` takes another launch of `add_residual_moments`.
    """
    (D, C), bias = weight.shape[:2], torch.randn(weight.shape[0], device=x.device)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    if C == D:
        found["conv2d, add_residual_moments"] = lambda: add_residual_moments(
            x, gpu.conv3x3(x, weight, None, enlarge=False), bias
        )[0]
    for size in candidates(architecture(x), x.dtype, C, D):

        def own(size: ConvTiles = size) -> torch.Tensor:
            return triton_kernel.conv3x3(x, weight, None, None, measured=False, tiles=size)[0]

        def with_residual(size: ConvTiles = size) -> torch.Tensor:
            return triton_kernel.conv3x3(x, weight, bias, x, measured=True, tiles=size)[0]

        found[f"Triton, {size.pixels} pixels"] = own
        if C == D:
            found[f"Triton with a residual, {size.pixels} pixels"] = with_residual
    return found


def four_pixels(weight: torch.Tensor) -> torch.Tensor:
    """Return the kernel `[4 * D, C, 2, 2]` that makes all four pixels of an enlarged map, from `[D, C, 3, 3]`."""
    rows = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    kernel = torch.einsum("aik,bjl,dckl->abdcij", rows, rows, weight.float()).flatten(0, 2)
    return kernel.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def time_in_graph(run: Callable[[], torch.Tensor]) -> list[float]:
    """Return percentiles 20, 50 and 80 of a call's milliseconds in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        return do_bench_cudagraph(run, quantiles=[0.2, 0.5, 0.8])
