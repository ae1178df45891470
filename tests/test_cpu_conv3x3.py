"""The C++ convolution against a convolution in float64, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar_kernels import conv3x3, cpu
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3 import cpu_kernel

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
LEVELS = range(cpu.best_level() + 1) if cpu.why_unavailable() is None else ()
SHAPES = [
    # images, channels, height, width, output channels
    (1, 16, 1, 1, 1),
    (2, 16, 2, 3, 3),
    (1, 32, 7, 5, 70),
    (3, 48, 9, 10, 16),
    (1, 160, 16, 16, 33),
    (2, 64, 33, 31, 128),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, C, H, W, D = shape
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(B, C, H, W, generator=generator), torch.randn(D, C, 3, 3, generator=generator)
    return x.to(dtype), (weight / (9 * C) ** 0.5).to(dtype), torch.randn(D, generator=generator).to(dtype)


def exact(x, weight, bias) -> torch.Tensor:
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1)


@pytest.mark.parametrize("level", LEVELS, ids=cpu.level_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_errs_at_most_four_times_as_much_as_a_direct_convolution(shape, dtype, level):
    tensors = inputs(shape, dtype)
    found, wanted = cpu_kernel.conv3x3(*tensors, level=level), exact(*tensors)
    direct = F.conv2d(*tensors, padding=1)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    unit = torch.finfo(dtype).eps * wanted.abs().max()
    for norm in (torch.linalg.vector_norm, lambda error: error.abs().max()):
        assert norm(found.double() - wanted) <= 4 * norm(direct.double() - wanted) + unit / 4


def test_the_result_depends_neither_on_threads_nor_on_the_memory_format_nor_on_the_other_images():
    x, weight, bias = inputs((4, 32, 20, 18, 40), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [conv3x3(x, weight, bias), conv3x3(x.contiguous(memory_format=torch.channels_last), weight, bias)]
            found.append(torch.cat([conv3x3(image, weight, bias) for image in x.split(1)]))
    finally:
        torch.set_num_threads(threads)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_an_image_is_padded_with_zeros_and_not_with_its_neighbours():
    x, weight, bias = inputs((3, 16, 5, 5, 8), torch.float32)
    alone = conv3x3(x[1:2], weight, bias)
    x[0], x[2] = torch.nan, torch.inf
    assert torch.equal(conv3x3(x, weight, bias)[1:2], alone)


def test_it_runs_where_kernels_run_in_cpp_and_the_channels_fit(monkeypatch: pytest.MonkeyPatch):
    calls = []
    kernel = cpu_kernel.conv3x3
    monkeypatch.setattr(cpu_kernel, "conv3x3", lambda *args: calls.append(args[0].dtype) or kernel(*args))
    x, weight, bias = inputs((1, 16, 6, 6, 4), torch.float32)
    conv3x3(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16
    assert calls == [torch.float32, torch.bfloat16]
    conv3x3(x.double(), weight.double(), bias.double())
    conv3x3(x[:, :3], weight[:, :3], bias)
    with using_backend("reference"):
        assert torch.equal(conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1))
    with torch.enable_grad():
        conv3x3(x.requires_grad_(), weight, bias).sum().backward()
    assert x.grad is not None
    assert len(calls) == 2


def test_a_changed_weight_is_transformed_anew():
    x, weight, bias = inputs((1, 16, 6, 6, 4), torch.float32)
    before = conv3x3(x, weight, bias)
    weight.mul_(2)
    torch.testing.assert_close(conv3x3(x, weight, bias) - bias[:, None, None], 2 * (before - bias[:, None, None]))
