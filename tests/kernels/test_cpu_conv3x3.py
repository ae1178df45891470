"""The CPU's convolutions against one in float64: that in C++ for every instruction set, and that of oneDNN."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actvar_kernels import conv3x3
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3 import cpu_kernel
from actvar_kernels.cpu_backend import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
ENGINES = [pytest.param(dict(engine="C++", isa=isa), id=f"C++, {cpu.isa_name(isa)}") for isa in ISAS]
ENGINES.append(pytest.param(dict(engine="oneDNN"), id="oneDNN"))
SHAPES = [
    # images, channels, height, width, output channels
    (1, 16, 1, 1, 1),
    (2, 16, 2, 3, 3),
    (1, 32, 7, 5, 70),
    (3, 48, 9, 10, 16),
    (1, 160, 16, 16, 33),
    (2, 64, 33, 31, 128),
]
DTYPES = cpu.DTYPES


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


def expect_small_errors(found, known, wanted):
    """At most four times those of a known algorithm that ends in the same dtype."""
    assert found.shape == wanted.shape
    unit = torch.finfo(found.dtype).eps * wanted.abs().max()
    for norm in (torch.linalg.vector_norm, lambda error: error.abs().max()):
        error, limit = norm(found.double() - wanted), 4 * norm(known.double() - wanted) + unit / 4
        assert error <= limit, f"{error:.3g}, at most {limit:.3g}"


def skip_what_onednn_lacks(how: dict, dtype: torch.dtype) -> None:
    if how["engine"] == "oneDNN" and dtype == torch.bfloat16 and not cpu.multiplies_bfloat16():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    if how["engine"] == "oneDNN" and dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("oneDNN has no float16 on this processor")


def winograd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, points: tuple[float, ...]) -> torch.Tensor:
    """Cook and Toom's construction from its definition, in x's dtype: at a point p an output polynomial of degree M - 1
    times the weights' of degree 2; its transpose is a convolution."""
    M, n = len(points) - 1, len(points) + 1

    def lagrange(leave_out: float | None) -> list[float]:  # coefficients of the product of (x - q)
        others = [q for q in points if q != leave_out]
        return list(np.polynomial.polynomial.polyfromroots(others)) + [0.0] * (n - 1 - len(others))

    inputs_ = torch.tensor([lagrange(p) for p in points] + [lagrange(None)], dtype=torch.float64)
    outputs = torch.tensor([[p**i for p in points] + [float(i == M - 1)] for i in range(M)], dtype=torch.float64)
    weights = torch.linalg.pinv(torch.einsum("ia,ak->ika", outputs, inputs_).flatten(0, 1))
    windows = torch.tensor([[float(k == i + j) for j in range(3)] for i in range(M) for k in range(n)]).double()
    G = weights @ windows

    H, W = x.shape[2:]
    x = F.pad(x, (1, 1 + -W % M, 1, 1 + -H % M)).unfold(2, n, M).unfold(3, n, M)  # [B, C, tiles, tiles, n, n]
    transformed = torch.einsum("ai,bj,dcij->dcab", G, G, weight.double()).to(x.dtype)
    for at in (4, 5):
        x = torch.einsum("ai,...i->...a", inputs_.to(x.dtype), x.transpose(at, -1)).transpose(at, -1)
    y = torch.einsum("bchwij,dcij->bdhwij", x, transformed)
    for at in (4, 5):
        y = torch.einsum("ai,...i->...a", outputs.to(x.dtype), y.transpose(at, -1)).transpose(at, -1)
    return y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :H, :W] + bias[:, None, None]


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize(
    ("dtype", "outputs"), [*((dtype, 2) for dtype in DTYPES), (torch.float32, 4), (torch.float16, 4)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_errs_at_most_four_times_as_much_as_pytorch(shape, dtype, outputs, isa):
    """Compare small tiles with a direct convolution, and large ones, which err more, with the same algorithm.

    Both convolve float16 in float32.
    """
    tensors = inputs(shape, dtype)
    found = cpu_kernel.conv3x3(*tensors, engine="C++", isa=isa, outputs=outputs)
    wanted = exact(*tensors)
    computed = [t.float() for t in tensors] if dtype == torch.float16 else tensors
    if outputs == 2:
        known = F.conv2d(*computed, padding=1)
    else:
        points = cpu_kernel.POINTS[outputs]
        torch.testing.assert_close(winograd(*(t.double() for t in tensors), points), wanted)
        known = winograd(*computed, points)
    assert found.dtype == dtype
    expect_small_errors(found, known.to(dtype), wanted)


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize(
    ("dtype", "outputs"),
    [(torch.float32, 2), (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2), (torch.float16, 4)],
    ids=str,
)
@pytest.mark.parametrize("columns", [40, 3])
def test_a_residual_is_added_with_one_rounding(columns, dtype, outputs, isa):
    x, weight, bias = inputs((2, 32, 10, 14, columns), dtype)
    residual = inputs((2, columns, 10, 14, 1), dtype)[0]
    found = cpu_kernel.conv3x3(x, weight, bias, residual, engine="C++", isa=isa, outputs=outputs)
    wanted = exact(x, weight, bias) + residual.double()
    direct = (F.conv2d(x.float(), weight.float(), bias.float(), padding=1) + residual.float()).to(dtype)
    error, unit = (found.double() - wanted).abs().max(), torch.finfo(dtype).eps * wanted.abs().max()
    assert error <= 4 * (direct.double() - wanted).abs().max() + unit / 4


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_of_an_enlarged_image_each_pixel_stands_four_times(shape, dtype, how):
    skip_what_onednn_lacks(how, dtype)
    x, weight, bias = inputs(shape, dtype)
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    residual = inputs((shape[0], shape[4], *large.shape[2:], 1), dtype)[0]
    wanted = exact(large, weight, bias)
    direct = F.conv2d(large.float(), weight.float(), bias.float(), padding=1)
    found = cpu_kernel.conv3x3(x, weight, bias, enlarge=True, **how)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expect_small_errors(found, direct.to(dtype), wanted)
    found = cpu_kernel.conv3x3(x, weight, bias, residual, enlarge=True, **how)
    expect_small_errors(found, (direct + residual.float()).to(dtype), wanted + residual.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:])  # the error of the single number of the first is chance
def test_onednn_errs_as_pytorch_does_and_adds_a_residual(shape, dtype):
    skip_what_onednn_lacks(dict(engine="oneDNN"), dtype)
    x, weight, bias = inputs(shape, dtype)
    residual = inputs((shape[0], shape[4], *shape[2:4], 1), dtype)[0]
    wanted, direct = exact(x, weight, bias), F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    found = cpu_kernel.conv3x3(x, weight, bias, engine="oneDNN")
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    expect_small_errors(found, direct.to(dtype), wanted)
    found = cpu_kernel.conv3x3(x, weight, bias, residual, engine="oneDNN")
    expect_small_errors(found, (direct + residual.float()).to(dtype), wanted + residual.double())


WITH_AMX = """
import torch
from torch.nn import functional as F
from actvar_kernels import conv3x3
from actvar_kernels.conv3x3 import onednn
from actvar_kernels.cpu_backend import cpu

cpu.has_tiles = cpu.multiplies_bfloat16
convolve, ran = onednn.conv3x3, []
onednn.conv3x3 = lambda x, *others: ran.append(x.dtype) or convolve(x, *others)
x, weight, bias = torch.randn(2, 32, 5, 7), torch.randn(9, 32, 3, 3) / 17, torch.randn(9)
wanted = F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        found = conv3x3(x.to(dtype), weight, bias, enlarge=True)
        torch.testing.assert_close(found.float(), wanted, atol=8 * torch.finfo(torch.bfloat16).eps, rtol=0)
print(*ran)
"""


def test_float16_is_transformed_without_leaving_its_range():
    x, weight, bias = inputs((1, 32, 9, 10, 16), torch.float16)
    x *= 6e4 / x.abs().max()
    for outputs in (2, 4):
        found = cpu_kernel.conv3x3(x, weight / 32, bias, engine="C++", outputs=outputs)
        expect_small_errors(found, exact(x, weight / 32, bias).half(), exact(x, weight / 32, bias))
    assert cpu_kernel.conv3x3(x, weight * 0 + 1, bias, engine="C++").isinf().any()


@pytest.mark.parametrize("instructions", ["AVX512_CORE_BF16", "AVX512_CORE", "AVX2"])
def test_with_amx_onednn_convolves_in_bfloat16_where_it_can(instructions):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    run = [sys.executable, "-c", WITH_AMX]
    found = subprocess.run(run, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout.split()
    assert found == ["torch.bfloat16"] * (cpu.multiplies_bfloat16() and instructions != "AVX2")


def test_without_amx_cpp_convolves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    x, weight, bias = inputs((1, 32, 6, 5, 8), torch.bfloat16)
    assert torch.equal(conv3x3(x, weight, bias), cpu_kernel.conv3x3(x, weight, bias, engine="C++"))


def test_larger_tiles_are_for_maps_that_are_large_beside_their_channels():
    x, weight, bias = inputs((1, 32, 16, 16, 40), torch.float32)
    for image, outputs in ((x, 4), (x[:, :, :, :9], 2), (x.bfloat16(), 2), (x.half(), 4)):
        assert torch.equal(conv3x3(image, weight, bias), cpu_kernel.conv3x3(image, weight, bias, outputs=outputs))


def test_shapes_that_do_not_fit_are_refused():
    x, weight, bias = inputs((1, 16, 6, 6, 4), torch.float32)
    residual = torch.ones(1, 4, 6, 6)
    for wrong, arguments in {
        "weight": (x, weight[:, :8], bias),
        "bias": (x, weight, bias[:3]),
        "residual": (x, weight, bias, residual[..., :5]),
        "x": (x[0], weight, bias),
    }.items():
        with pytest.raises(ValueError, match=f"^{wrong}: expected shape"):
            conv3x3(*arguments)
    with pytest.raises(ValueError, match=r"residual: expected shape \[1, 4, 12, 12\]"):
        conv3x3(x, weight, bias, residual, enlarge=True)


def test_with_a_residual_in_another_type_or_without_the_kernel_it_is_the_sum_of_both():
    x, weight, bias = inputs((1, 16, 6, 6, 4), torch.float32)
    residual = torch.ones(1, 4, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv3x3(x, weight, bias, residual, enlarge=True)
        assert torch.equal(found, residual + conv3x3(x, weight, bias, enlarge=True))
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    with using_backend("reference"):
        found = conv3x3(x, weight, bias, residual, enlarge=True)
    assert torch.equal(found, residual + F.conv2d(large, weight, bias, padding=1))


def test_the_result_depends_neither_on_threads_nor_on_the_memory_format_nor_on_the_other_images():
    x, weight, bias = inputs((4, 80, 20, 18, 40), torch.float32)
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
    for side in (5, 9):  # by small tiles and by large ones
        x, weight, bias = inputs((3, 16, side, side, 8), torch.float32)
        alone = conv3x3(x[1:2], weight, bias)
        x[0], x[2] = torch.nan, torch.inf
        assert torch.equal(conv3x3(x, weight, bias)[1:2], alone)
        x, weight, bias = inputs((3, 16, side, side, 8), torch.float32)
        alone = conv3x3(x[1:2], weight, bias, enlarge=True)
        x[0], x[2] = torch.nan, torch.inf
        assert torch.equal(conv3x3(x, weight, bias, enlarge=True)[1:2], alone)


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


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("engine", ["C++", "oneDNN"])
def test_a_changed_weight_is_packed_anew(engine, enlarge):
    x, weight, bias = inputs((1, 16, 6, 6, 4), torch.float32)
    before = cpu_kernel.conv3x3(x, weight, bias, enlarge=enlarge, engine=engine) - bias[:, None, None]
    weight.mul_(2)
    after = cpu_kernel.conv3x3(x, weight, bias, enlarge=enlarge, engine=engine) - bias[:, None, None]
    torch.testing.assert_close(after, 2 * before)
