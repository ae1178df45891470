"""The 3x3 convolution on Triton: convolution, bias, residual and moments against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor
from torch.nn import functional as F

from actvar.models.basic_vae import ResnetBlock
from actvar.models.fused_vae import Fused, Map
from actvar_kernels import group_norm_silu
from actvar_kernels.conv3x3 import gpu, triton_kernel
from actvar_kernels.triton_backend import conv_tiles
from actvar_kernels.triton_backend.conv_tiles import ConvTiles

SMALL = ConvTiles(pixels=16, columns=16, tail=0, depth=16, warps=4, stages=2, descriptors=False)
TAIL = SMALL._replace(pixels=32, tail=16)
SHAPES = [
    pytest.param((1, 3, 1, 1, 3), SMALL, id="one pixel"),
    pytest.param((2, 16, 5, 7, 16), SMALL, id="odd sides"),
    pytest.param((2, 20, 6, 4, 40), TAIL, id="channels and outputs that tiles do not divide"),
    pytest.param((1, 32, 4, 8, 32), TAIL, id="whole tiles"),
    pytest.param((1, 16, 3, 40, 20), TAIL, id="rows longer than a tile"),
]
"""Images, channels, height, width, outputs; tiles."""


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "sizes"), SHAPES)
def test_convolution_bias_and_residual_in_any_grid_order(shape, sizes, dtype, grid_order) -> None:
    B, C, H, W, D = shape
    x, weight = image(B, C, H, W, dtype=dtype), normal(D, C, 3, 3, seed=1, std=(9 * C) ** -0.5, dtype=dtype)
    bias, residual = normal(D, seed=2, dtype=dtype), image(B, D, H, W, seed=3, dtype=dtype)
    for others in ((None, None), (bias, None), (bias, residual)):
        out, moments = triton_kernel.conv3x3(x, weight, *others, measured=False, tiles=sizes)
        assert moments is None
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_close(out, *exact_and_tolerance(convolved, x, weight, *others))


@pytest.mark.parametrize(("shape", "sizes"), SHAPES[1:])
def test_moments_are_those_of_the_stored_sum_in_parts_of_a_tile(shape, sizes) -> None:
    B, C, H, W, D = shape
    x, weight = image(B, C, H, W), normal(D, C, 3, 3, seed=1, std=(9 * C) ** -0.5, dtype=torch.float32)
    residual = image(B, D, H, W, seed=3) + 50  # a large mean takes no digits of the deviations
    out, moments = triton_kernel.conv3x3(x, weight, None, residual, measured=True, tiles=sizes)

    def measured(out: Tensor) -> Tensor:
        parts = out.flatten(2).split(sizes.pixels, dim=2)
        means = torch.stack([part.mean(dim=2) for part in parts], dim=1)
        squares = [(part - part.mean(dim=2, keepdim=True)).square().sum(dim=2) for part in parts]
        return torch.stack((means, torch.stack(squares, dim=1)), dim=1)

    for part in range(2):
        assert_close(moments[:, part], *exact_and_tolerance(lambda out, part=part: measured(out)[:, part], out))


def test_a_changed_weight_is_seen() -> None:
    x, weight = image(1, 16, 3, 3), normal(16, 16, 3, 3, seed=1, dtype=torch.float32)
    before, _ = triton_kernel.conv3x3(x, weight, None, None, measured=False, tiles=SMALL)
    weight.mul_(2)
    after, _ = triton_kernel.conv3x3(x, weight, None, None, measured=False, tiles=SMALL)
    torch.testing.assert_close(after, 2 * before)


@pytest.mark.parametrize("width", [8, 32])
def test_tensor_descriptors_give_what_pointers_give(width: int) -> None:
    x, weight = image(2, 32, 6, width), normal(32, 32, 3, 3, seed=1, dtype=torch.float32)
    residual = image(2, 32, 6, width, seed=3)
    sizes = TAIL._replace(pixels=16, descriptors=True)
    assert sizes.takes_descriptors(32, width)
    by_pointers, by_descriptors = (
        triton_kernel.conv3x3(x, weight, None, residual, measured=True, tiles=sizes._replace(descriptors=descriptors))
        for descriptors in (False, True)
    )
    assert all(map(torch.equal, by_pointers, by_descriptors))


def test_a_norm_reads_moments_in_parts_of_a_tile(own_kernel) -> None:
    x, weight = image(2, 16, 5, 7), normal(32, 16, 3, 3, seed=1, std=1 / 12, dtype=torch.float32)
    bias, residual = normal(32, seed=2, dtype=torch.float32), image(2, 32, 5, 7, seed=3)
    found = gpu.conv3x3_measured(x, weight, bias, residual)
    assert found.part == SMALL.pixels
    scale, shift = normal(32, seed=4, dtype=torch.float32), normal(32, seed=5, dtype=torch.float32)
    normed = group_norm_silu(found.x, scale, shift, 4, 1e-6, moments=found.moments, part=found.part)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.silu(F.group_norm(convolved(x, weight, bias, residual), 4, scale, shift, 1e-6))

    assert_close(normed, *exact_and_tolerance(plain, x, weight, bias, residual, scale, shift))
    with pytest.raises(ValueError, match=r"part: expected 3 parts of 35 positions, got 8 in each"):
        group_norm_silu(found.x, scale, shift, 4, 1e-6, moments=found.moments, part=8)


@pytest.mark.parametrize("inputs", [32, 64], ids=["same width", "with a shortcut"])
def test_a_block_of_the_decoder_convolves_as_the_table_says(inputs: int, own_kernel) -> None:
    torch.manual_seed(0)
    block = ResnetBlock(inputs, 32).requires_grad_(False).eval()
    x = image(1, inputs, 3, 5)
    out = Fused(on_triton=True, in_cpp=False).resnet(block, Map(x))
    assert own_kernel == [False, True], "the second convolution adds the residual and measures the sum"
    assert out.part == SMALL.pixels
    exact = copy.deepcopy(block).double()(x.double())
    assert_close(out.x, exact, 4 * (block(x) - exact).abs().max().item())


@pytest.fixture
def own_kernel(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The table has this package's kernel for every convolution; returns for each whether it measures its result."""
    launched = []

    def launch(*arguments, measured: bool, tiles: ConvTiles):
        launched.append(measured)
        return convolve(*arguments, measured=measured, tiles=tiles)

    convolve = triton_kernel.conv3x3
    monkeypatch.setattr(triton_kernel, "conv3x3", launch)
    monkeypatch.setattr(gpu, "takes", lambda x: x.is_contiguous(memory_format=torch.channels_last))
    monkeypatch.setattr(gpu, "measured_tiles", lambda x, weight, fused: SMALL)
    return launched


@pytest.mark.parametrize("outputs", [3, 32, 160, 320, 640])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_decoders_outputs_fill_their_tiles(outputs: int, arch: int) -> None:
    for sizes in conv_tiles.candidates(arch, torch.bfloat16, 160, outputs):
        assert outputs % (sizes.columns + sizes.tail) == 0 or outputs < 160
