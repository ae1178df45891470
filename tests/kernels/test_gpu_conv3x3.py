"""Convolutions as they run on a GPU, by PyTorch's library and with kept copies of weights, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from actvar_kernels.conv3x3 import gpu
from actvar_kernels.cpu_backend.packing import copies, drop, drops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize(
    ("outputs", "with_bias"), [(3, True), (3, False), (8, True), (64, True), (70, True), (72, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_convolution_by_three_times_three(outputs, with_bias, dtype, enlarge):
    x, weight = image(2, 16, 5, 7, dtype=dtype), normal(outputs, 16, 3, 3, dtype=dtype)
    bias = normal(outputs, dtype=dtype) if with_bias else None

    def plain(x, weight, bias):
        x = F.interpolate(x, scale_factor=2, mode="nearest") if enlarge else x
        return F.conv2d(x, weight, bias, padding=1)

    exact = plain(*(None if t is None else t.double() for t in (x, weight, bias)))
    for _ in range(2):  # by a new copy of the weight, and by the kept one
        found = gpu.conv3x3(x, weight, bias, enlarge)
        assert found.shape == exact.shape
        assert found.is_contiguous(memory_format=torch.channels_last) or outputs not in (64, 72)
        assert (found - exact).abs().max() <= 4 * (plain(x, weight, bias) - exact).abs().max()


def test_an_enlarging_kernel_is_exact_in_float64():
    x, weight = normal(2, 6, 5, 7, dtype=torch.float64), normal(4, 6, 3, 3, dtype=torch.float64)
    found = F.conv_transpose2d(x, gpu.enlarging(weight, torch.float64), stride=2, padding=1)
    exact = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_an_enlarged_image_takes_four_products_in_place_of_nine():
    x, weight = image(1, 16, 4, 4), normal(64, 16, 3, 3)
    gpu.conv3x3(x, weight, None, enlarge=True)  # makes the copy of the weight
    counted = []
    for run in (
        lambda: gpu.conv3x3(x, weight, None, enlarge=True),
        lambda: F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    assert counted[1] == 2.25 * counted[0]


def test_a_convolution_by_one_is_that_of_pytorch():
    x, weight, bias = image(2, 16, 5, 7), normal(8, 16, 1, 1), normal(8)
    assert torch.equal(gpu.conv1x1(x, weight, bias), F.conv2d(x, weight, bias))


def test_copies_are_made_once_and_follow_their_weight():
    x, weight = image(1, 16, 4, 4, dtype=torch.bfloat16), normal(64, 16, 3, 3)
    first = gpu.kept(weight, torch.bfloat16)
    assert first is gpu.kept(weight, torch.bfloat16)
    assert first.is_contiguous(memory_format=torch.channels_last)
    gpu.conv3x3(x, weight, None, enlarge=False)
    gpu.conv3x3(x, weight, None, enlarge=True)
    assert len(copies([weight])) == 2, "as it is, and to enlarge"
    weight.mul_(2)
    assert torch.equal(gpu.kept(weight, torch.bfloat16), 2 * first)
    before = drops()
    drop([weight])
    assert drops() == before + 1
    assert copies([weight]) == []


def test_a_weight_that_needs_no_copy_has_none():
    weight = image(64, 16, 3, 3)
    assert gpu.kept(weight, torch.float32) is weight
    assert copies([weight]) == []


def test_images_elsewhere_are_not_taken():
    assert not gpu.takes(image(1, 16, 4, 4)), "on the CPU"
