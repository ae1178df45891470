"""The autoencoder on the CPU bit for bit as PyTorch's modules have it, and its two ways to enlarge maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar.models.quantizer import upsampled_by_axis
from actvar.models.vqvae import AttnBlock, ResnetBlock, Upsample, twice_as_large
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3.op import whole_vectors


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("side", "larger"), [(1, 16), (2, 16), (5, 16), (13, 16), (24, 32), (6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bicubic_by_axis_gives_the_same_numbers(side: int, larger: int, dtype: torch.dtype) -> None:
    maps = normal(3, 32, side, side, dtype=dtype)
    found = upsampled_by_axis(maps, larger)
    expected = F.interpolate(maps, size=(larger, larger), mode="bicubic")
    assert found.dtype == dtype
    assert found.is_contiguous()
    exact = F.interpolate(maps.double(), size=(larger, larger), mode="bicubic")
    error = (expected.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 1.01 * error


@pytest.mark.parametrize("channels", [16, 12, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_twice_as_large_is_the_nearest_neighbour(channels: int, dtype: torch.dtype) -> None:
    x = normal(2, channels, 3, 5, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = twice_as_large(x.contiguous(memory_format=layout))
        assert torch.equal(found, F.interpolate(x, scale_factor=2, mode="nearest"))
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@torch.no_grad()
def test_blocks_on_the_cpu_are_the_modules_in_turn(backend: str) -> None:
    x = normal(2, 32, 6, 6)
    for width in (32, 64):
        resnet = ResnetBlock(32, width)
        with using_backend(backend):
            h = resnet.conv1(F.silu(resnet.norm1(x)))
            h = resnet.conv2(F.silu(resnet.norm2(h)))
            assert torch.equal(resnet(x), resnet.nin_shortcut(x) + h)
    attention, upsample = AttnBlock(32), Upsample(32)
    with using_backend(backend):
        q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, 32, 36).unbind(1)
        weights = (torch.bmm(q.transpose(1, 2), k) * 32**-0.5).softmax(dim=2)
        h = torch.bmm(v, weights.transpose(1, 2)).view(x.shape)
        assert torch.equal(attention(x), x + attention.proj_out(h))
        enlarged, offset = upsample(x)
        assert offset is None
        assert torch.equal(enlarged, upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest")))


@pytest.mark.parametrize(("outputs", "with_bias"), [(3, True), (3, False), (8, True)])
def test_outputs_that_are_filled_up_change_no_other(outputs, with_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 5, 7, generator=generator)
    weight, bias = torch.randn(outputs, 16, 3, 3, generator=generator), torch.randn(outputs, generator=generator)
    bias = bias if with_bias else None
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    torch.testing.assert_close(whole_vectors(x, weight, bias), exact.float(), rtol=1e-5, atol=1e-5)
