"""Linear layers and experts on PyTorch's products, in 16 and in eight bits, for every instruction set."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actvar_kernels import expert_ffn, linear
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.expert_ffn import cpu_brgemm, reference
from actvar_kernels.expert_ffn.weights import FFNWeights
from actvar_kernels.linear import cpu_brgemm as linear_brgemm
from actvar_kernels.linear.quantized import quantized_linear, quantized_weight

ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
DTYPES = cpu.DTYPES
LAYERS = [(1, 64, 64), (7, 70, 33), (2, 4, 1), (130, 192, 576), (600, 36, 70), (513, 129, 65)]
FFNS = [(1, 64, 16, 4), (7, 70, 9, 4), (200, 192, 48, 16), (700, 130, 70, 8), (70, 64, 256, 4), (530, 66, 320, 3)]

needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")
needs_bfloat16 = pytest.mark.skipif(not brgemm.runs(torch.bfloat16), reason="no products of bfloat16 here")


def normal(*size: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(size) * std).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def layer(T: int, C: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(T, C, dtype=dtype), normal(D, C, std=C**-0.5, dtype=dtype), normal(D, dtype=dtype)


def ffn(T: int, C: int, width: int, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, FFNWeights]:
    """Return u, a mask with a token that chose nothing, and the weights."""
    D = width * experts
    weights = normal(D, C, std=C**-0.5), normal(D, std=0.1), normal(C, D, std=D**-0.5), normal(C, std=0.1)
    mask = torch.rand(T, experts) < 0.7
    mask[0] = False
    return normal(T, C, dtype=dtype), mask, FFNWeights(*(weight.to(dtype) for weight in weights))


@needs_bytes
@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "D"), LAYERS)
def test_a_layer_in_eight_bits_is_the_reference_bit_for_bit(T, C, D, dtype, isa):
    arguments = layer(T, C, D, dtype)
    assert torch.equal(linear_brgemm.linear(*arguments, int8=True, isa=isa), quantized_linear(*arguments, torch.int8))


@needs_bytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_numbers_are_those_of_the_reference(dtype):
    x, weight, bias = layer(8, 48, 20, dtype)
    for row, value in enumerate((0.0, torch.inf, torch.nan, -torch.inf, 1e-42, 3e38)):
        x[row] = 0
        x[row, 5] = value
    found, due = linear_brgemm.linear(x, weight, bias, int8=True), quantized_linear(x, weight, bias, torch.int8)
    assert torch.equal(found.isnan(), due.isnan())
    assert torch.equal(found.nan_to_num(), due.nan_to_num())


@needs_bytes
@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "width", "experts"), FFNS)
def test_experts_in_eight_bits_err_as_the_reference_does(T, C, width, experts, dtype, isa):
    u, mask, weights = ffn(T, C, width, experts, dtype)
    exact = reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    due = reference.quantized_expert_ffn(u, mask, *weights, torch.int8).double()
    found = cpu_brgemm.expert_ffn(u, mask, weights, int8=True, isa=isa).double()
    # GELU rounds in another way, so that now and then a hidden unit becomes the next byte
    assert (found - exact).norm() <= 1.05 * (due - exact).norm()
    assert (found - due).norm() <= 0.25 * (due - exact).norm()
    assert torch.equal(found[0], weights.fc2_bias.double())


@needs_bytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "width", "experts"), FFNS)
def test_skipped_experts_are_those_that_are_set_to_zero(T, C, width, experts, dtype):
    u, mask, weights = ffn(T, C, width, experts, dtype)
    skipped, zeros = (cpu_brgemm.expert_ffn(u, mask, weights, int8=True, skips=skips) for skips in (True, False))
    assert torch.equal(skipped, zeros)


@needs_bfloat16
@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize(("T", "C", "D"), LAYERS)
def test_a_layer_in_bfloat16_errs_no_more_than_pytorch(T, C, D, isa):
    x, weight, bias = layer(T, C, D, torch.bfloat16)
    exact = F.linear(x.double(), weight.double(), bias.double())
    found, due = linear_brgemm.linear(x, weight, bias, int8=False, isa=isa), F.linear(x, weight, bias)
    assert (found.double() - exact).abs().max() <= 1.1 * (due.double() - exact).abs().max() + 1e-6


@needs_bfloat16
@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("skips", [True, False], ids=["skips", "zeros"])
@pytest.mark.parametrize(("T", "C", "width", "experts"), FFNS)
def test_experts_in_bfloat16_err_no_more_than_the_reference(T, C, width, experts, skips, isa):
    u, mask, weights = ffn(T, C, width, experts, torch.bfloat16)
    exact = reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    due = reference.expert_ffn(u, mask, *weights).double()
    found = cpu_brgemm.expert_ffn(u, mask, weights, int8=False, skips=skips, isa=isa).double()
    assert (found - exact).norm() <= 1.1 * (due - exact).norm() + 1e-6


@contextmanager
def products_of_float16(step: int) -> Iterator[None]:
    """Let C++ call a stand-in for PyTorch's products of float16, which need tiles of it (AMX-FP16).

    Args:
        step: rows of the second factor that lie side by side.
    """
    of_pytorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    pointers = [ctypes.cast(getattr(of_pytorch, symbol), ctypes.c_void_p) for symbol in brgemm._SYMBOLS]

    def multiply(M, N, K, a_stride, b_stride, c_stride, adds, a, b, c, packed) -> None:
        rows = numbers(a, (M, K), (a_stride, 1), ctypes.c_int16).view(torch.float16)
        shape, strides = (K // step, step, N), (step * b_stride, 1, step)
        columns = numbers(b, shape, strides, ctypes.c_int16).view(torch.float16).reshape(K, N)
        sums = numbers(c, (M, N), (c_stride, 1), ctypes.c_float)
        product = rows.double() @ columns.double()
        sums.copy_(sums + product if adds else product)

    stand_in = ctypes.CFUNCTYPE(None, *6 * [ctypes.c_int64], ctypes.c_bool, *3 * [ctypes.c_void_p], ctypes.c_bool)
    kept = stand_in(multiply)
    library = brgemm.library()
    try:
        library.set_brgemm(*pointers[:2], ctypes.cast(kept, ctypes.c_void_p), pointers[3])
        yield
    finally:
        library.set_brgemm(*pointers)


def numbers(address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: type) -> torch.Tensor:
    """Return a view of memory."""
    dtype = {ctypes.c_int16: torch.int16, ctypes.c_float: torch.float32}[kind]
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.frombuffer((kind * count).from_address(address), dtype=dtype)
    return memory.as_strided(shape, strides)


@needs_bytes
def test_products_of_float16_are_taken_where_they_read_pairs_of_rows():
    library = brgemm.library()
    for step in (1, 2):
        with products_of_float16(step):
            assert library.brgemm_works(list(brgemm.LAYOUTS).index(torch.float16)) == (step == 2)


@needs_bytes
@pytest.mark.parametrize(("T", "C", "D"), LAYERS)
def test_a_layer_in_float16_errs_no_more_than_pytorch(T, C, D):
    x, weight, bias = layer(T, C, D, torch.float16)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with products_of_float16(2):
        found, due = linear_brgemm.linear(x, weight, bias, int8=False), F.linear(x, weight, bias)
    assert (found.double() - exact).abs().max() <= 1.1 * (due.double() - exact).abs().max() + 1e-6


@needs_bytes
@pytest.mark.parametrize("skips", [True, False], ids=["skips", "zeros"])
@pytest.mark.parametrize(("T", "C", "width", "experts"), FFNS)
def test_experts_in_float16_err_no_more_than_the_reference(T, C, width, experts, skips):
    u, mask, weights = ffn(T, C, width, experts, torch.float16)
    exact = reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    due = reference.expert_ffn(u, mask, *weights).double()
    with products_of_float16(2):
        found = cpu_brgemm.expert_ffn(u, mask, weights, int8=False, skips=skips).double()
    assert (found - exact).norm() <= 1.1 * (due - exact).norm() + 1e-6


@needs_bytes
def test_results_do_not_depend_on_the_number_of_threads():
    u, mask, weights = ffn(600, 130, 70, 8, torch.bfloat16)
    kinds = [True, False] if brgemm.runs(torch.bfloat16) else [True]
    threads = torch.get_num_threads()
    try:
        for int8, skips in itertools.product(kinds, (True, False)):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(cpu_brgemm.expert_ffn(u, mask, weights, int8=int8, skips=skips))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


@needs_bfloat16
def test_a_processor_with_tiles_takes_the_products_of_pytorch(monkeypatch):
    monkeypatch.setattr(brgemm, "has_tiles", lambda dtype: dtype == torch.bfloat16)
    called = []
    for module, name in ((linear_brgemm, "linear"), (cpu_brgemm, "expert_ffn")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _of=original, **k: (called.append(_of), _of(*a, **k))[1])
    x, weight, bias = layer(9, 64, 32, torch.bfloat16)
    u, mask, weights = ffn(9, 64, 16, 4, torch.bfloat16)
    assert torch.equal(linear(x, weight, bias), linear_brgemm.linear(x, weight, bias, int8=False))
    exact = reference.expert_ffn(u.double(), mask, *(part.double() for part in weights))
    found = expert_ffn(u, mask, 4, *weights).double()
    assert (found - exact).norm() <= 0.01 * exact.norm()
    assert len(called) == 3
    linear(x.float(), weight.float(), bias.float())
    assert len(called) == 3  # float32 runs on the package's own products


@needs_bytes
def test_a_changed_weight_is_packed_anew():
    x, weight, bias = layer(9, 64, 32, torch.float32)
    before = linear(x, weight, bias, quantized=torch.int8)
    weight.mul_(2)
    after = linear(x, weight, bias, quantized=torch.int8)
    assert torch.equal(after, quantized_linear(x, weight, bias, torch.int8))
    assert not torch.equal(after, before)


@needs_bytes
def test_packed_bytes_take_half_of_the_memory_of_bfloat16():
    weight = normal(256, 128)
    copy = linear_brgemm.pack(weight.t().unsqueeze(0).to(torch.int8), torch.ones(256))
    assert copy.panels.nbytes == weight.bfloat16().nbytes / 2


class Outputs(TorchDispatchMode):
    """Note bytes and dtypes of what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.found += [(part.nbytes, part.dtype) for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        return result


@needs_bytes
def test_weights_are_packed_in_bytes_without_a_wider_copy_of_all():
    weight = normal(3072, 1024)
    with Outputs() as outputs:
        rows, scales = quantized_weight(weight, torch.int8)
        linear_brgemm.pack(rows.t().unsqueeze(0), scales.flatten())
    wider = [size for size, dtype in outputs.found if dtype in (torch.float32, torch.int32)]
    assert 0 < max(wider) <= 2**20


@needs_bytes
def test_sums_that_32_bits_do_not_hold_are_refused():
    most = linear_brgemm.MOST_INPUTS
    x, weight = torch.ones(2, most), torch.ones(3, most)
    assert torch.equal(
        linear(x, weight, torch.zeros(3), quantized=torch.int8), quantized_linear(x, weight, torch.zeros(3), torch.int8)
    )
    with pytest.raises(ValueError, match=f"expected at most {most} inputs in eight bits, got {most + 1}"):
        linear(torch.ones(2, most + 1), torch.ones(3, most + 1), torch.zeros(3), quantized=torch.int8)


@needs_bytes
def test_a_layer_without_rows_is_empty():
    x, weight, bias = layer(0, 64, 32, torch.float32)
    assert linear(x, weight, bias, quantized=torch.int8).shape == (0, 32)
    u, mask, weights = torch.empty(0, 64), torch.ones(0, 4, dtype=torch.bool), ffn(1, 64, 16, 4, torch.float32)[2]
    assert expert_ffn(u, mask, 4, *weights, quantized=torch.int8).shape == (0, 64)
