"""Products in eight bits: what the reference defines, and who runs them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from actvar_kernels import BackendUnavailableError, expert_ffn, linear
from actvar_kernels.backend import using_backend
from actvar_kernels.constants import FORMATS
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.expert_ffn import reference
from actvar_kernels.linear.quantized import LARGEST, quantize, quantized_linear, quantized_weight

EVERY = pytest.mark.parametrize("quantized", FORMATS.values(), ids=FORMATS)
needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")


def layer(T: int, C: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return x, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((T, C), 1.0), ((D, C), C**-0.5), ((D,), 1.0)
    x, weight, bias = ((torch.randn(size, generator=generator) * std).to(dtype) for size, std in sizes)
    return x, weight, bias


def test_a_row_is_quantized_to_the_nearest_half_to_even():
    q, scale = quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.6, 0.0]]), torch.int8)
    assert q.tolist() == [[127, 0, 2, -2, -127, 0]]
    assert scale.tolist() == [[1.0]]


def test_a_row_in_fp8_is_rounded_to_the_nearest_half_to_even():
    q, scale = quantize(
        torch.tensor([[448.0, 432.0, 17.0, 19.0, -21.0, 2.0**-10, 3 * 2.0**-10, 0.0]]), torch.float8_e4m3fn
    )
    assert q.float().tolist() == [[448, 448, 16, 20, -20, 0, 2.0**-8, 0]]
    assert scale.tolist() == [[1.0]]


@EVERY
def test_the_largest_number_of_a_row_becomes_the_largest_there_is(quantized):
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    q, _ = quantize(x, quantized)
    assert q.double().abs().amax(1).eq(LARGEST[quantized]).all()


@EVERY
def test_rows_without_a_usable_scale_are_zeros(quantized):
    rows = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [1e-45, 0.0]])
    q, scale = quantize(rows, quantized)
    assert q.double().eq(0).all()
    assert scale.flatten().tolist()[0] == 0
    assert scale[1].isinf().all()
    assert scale[2].isnan().all()


@EVERY
def test_a_weight_is_quantized_in_parts_as_in_one(quantized):
    _, weight, _ = layer(1, 2**16, 9)
    assert all(map(torch.equal, quantized_weight(weight, quantized), quantize(weight, quantized)))


@EVERY
def test_the_product_is_that_of_the_dequantized_factors(quantized):
    x, weight, bias = layer(5, 40, 7)
    (q, x_scale), (w, w_scale) = quantize(x, quantized), quantize(weight, quantized)
    due = (q.double() * x_scale) @ (w.double() * w_scale).T + bias.double()
    magnitude = (q.double() * x_scale).abs() @ (w.double() * w_scale).abs().T + bias.double().abs()
    error = (quantized_linear(x, weight, bias, quantized).double() - due).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * magnitude).all()  # four roundings and those of the scales


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_half_a_step_of_every_factor(quantized, dtype):
    x, weight, bias = layer(9, 64, 33, dtype)
    due = x.double() @ weight.double().T + bias.double()
    off_x, off_w = (half_steps(t.double(), quantized) for t in (x, weight))
    allowed = off_x @ weight.double().abs().T + x.double().abs() @ off_w.T + off_x @ off_w.T
    rounded = torch.finfo(dtype).eps * (due.abs() + allowed)
    assert ((quantized_linear(x, weight, bias, quantized).double() - due).abs() <= allowed + rounded).all()


def half_steps(x: torch.Tensor, quantized: torch.dtype) -> torch.Tensor:
    """Return for every number half the distance between the two that it may be rounded to."""
    scale = x.abs().amax(1, keepdim=True) / LARGEST[quantized]
    if quantized == torch.int8:
        return (scale / 2).expand_as(x)
    return scale / 2 * 2.0 ** ((x / scale).abs().clamp(min=2.0**-6).log2().floor() - 3)


def test_experts_that_are_off_have_no_part_in_the_scale():
    u, up, bias = layer(3, 16, 32)
    _, down, _ = layer(1, 32, 16)
    mask = torch.tensor([[True, False]]).expand(3, 2)
    bias = bias.clone()
    bias[16:] = 1e6  # the second expert alone, whose scale would leave nothing of the first
    off = reference.quantized_expert_ffn(u, mask, up, bias, down, torch.zeros(16), torch.int8)
    alone = reference.quantized_expert_ffn(
        u, mask[:, :1], up[:16], bias[:16], down[:, :16], torch.zeros(16), torch.int8
    )
    assert (off - alone).abs().max() <= 0.02 * alone.abs().max()


@EVERY
def test_the_reference_runs_anywhere(quantized):
    x, weight, bias = layer(3, 10, 5)
    with using_backend("reference"):
        assert torch.equal(linear(x, weight, bias, quantized), quantized_linear(x, weight, bias, quantized))


@EVERY
def test_a_gradient_is_refused(quantized):
    x, weight, bias = layer(3, 16, 5)
    with pytest.raises(BackendUnavailableError, match=r"no gradient; call it under torch.no_grad"):
        linear(x.requires_grad_(), weight, bias, quantized)


@EVERY
def test_triton_on_the_cpu_is_refused(quantized):
    with using_backend("triton"), pytest.raises(BackendUnavailableError, match="needs CUDA tensors"):
        linear(*layer(3, 16, 5), quantized)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_fp8_in_c_plus_plus_is_refused(backend):
    message = r"linear in fp8 cannot run this call: C\+\+ has no products of fp8; use int8, a GPU, or ACTVAR_BACKEND="
    with using_backend(backend), pytest.raises(BackendUnavailableError, match=message):
        linear(*layer(3, 16, 5), torch.float8_e4m3fn)


@pytest.mark.parametrize("quantized", [torch.float8_e5m2, torch.float16, torch.uint8], ids=str)
def test_another_dtype_is_refused(quantized):
    with pytest.raises(ValueError, match=r"quantized: expected one of torch\.int8, torch\.float8_e4m3fn, got torch"):
        linear(*layer(3, 16, 5), quantized)


@needs_bytes
def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        linear(*layer(3, 16, 5, torch.float64), quantized=torch.int8)


def test_gates_are_refused():
    u, up, bias = layer(3, 16, 32)
    _, down, _ = layer(1, 32, 16)
    with pytest.raises(TypeError, match="expected bool"):
        expert_ffn(u, torch.ones(3, 2), 2, up, bias, down, torch.zeros(16), quantized=torch.int8)


@needs_bytes
def test_a_traced_call_runs_the_reference():
    x, weight, bias = layer(3, 16, 5)
    traced = torch.jit.trace(lambda x: linear(x, weight, bias, quantized=torch.int8), x, check_trace=False)
    assert torch.equal(traced(x), quantized_linear(x, weight, bias, torch.int8))


@needs_bytes
def test_autocast_says_the_dtype():
    x, weight, bias = layer(3, 16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight, bias, quantized=torch.int8)
    assert torch.equal(found, quantized_linear(x.bfloat16(), weight, bias, torch.int8))


IMITATED = """
import torch
from actvar_kernels import BackendUnavailableError, linear
from actvar_kernels.cpu_backend import brgemm
x, weight, bias = torch.ones(4, 64), torch.ones(8, 64), torch.zeros(8)
try:
    linear(x, weight, bias, quantized=torch.int8)
    int8 = "runs"
except BackendUnavailableError as error:
    int8 = str(error)
print(brgemm.runs(torch.bfloat16), brgemm.has_tiles(torch.bfloat16), brgemm.runs(torch.float16), int8)
"""


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason="no C++ kernels")
@pytest.mark.parametrize("most", ["AVX2", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"])
def test_a_lesser_processor_runs_what_it_can_and_refuses_the_rest(most):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": most}
    found = subprocess.run(
        [sys.executable, "-c", IMITATED], env=environment, capture_output=True, text=True, check=True
    )
    bfloat16, tiles, float16, int8 = found.stdout.strip().split(" ", 3)
    assert tiles == float16 == "False"
    assert bfloat16 == str(most == "AVX512_CORE_BF16" and brgemm.runs(torch.bfloat16))
    if most == "AVX2" or not brgemm.runs(torch.int8):
        assert "no products of bytes (AVX-512 with VNNI)" in int8
    else:
        assert int8 == "runs"
