"""The C++ kernels on aarch64: compiled by a cross compiler, and run in an emulator beside float64."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actvar_kernels.cpu_backend import building, cpu
from actvar_kernels.cpu_backend.building import _Step
from actvar_kernels.expert_ffn import cpu_kernel as ffn_kernel
from actvar_kernels.expert_ffn import reference as ffn_reference
from actvar_kernels.residual_norm import reference as norm_reference
from actvar_kernels.subset_attention import reference as attention_reference
from actvar_kernels.token_draw import cpu_kernel as draw_kernel

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"
DRIVER = Path(__file__).parents[1] / "support" / "call_function.cpp"
PORTABLE = 0  # the only instruction set there; its layout is that on x86-64
THREADS = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no compiler for aarch64 (g++-aarch64-linux-gnu)"),
]
needs_emulator = pytest.mark.skipif(
    EMULATOR is None or cpu.why_unavailable() is not None, reason="no emulator of aarch64 (qemu-user), or no C++ here"
)
every_dtype = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the library, the samplers and the driver, with the flags of the package."""
    folder, deadline, compiler = tmp_path_factory.mktemp("aarch64"), time.monotonic() + 3600, [str(COMPILER)]
    for name, sources, flags in (
        ("library.so", cpu.SOURCES, cpu.FLAGS),
        ("samplers.so", draw_kernel.SOURCES, draw_kernel.FLAGS),
    ):
        objects = [folder / f"{name}.{number}.o" for number in range(len(sources))]
        commands = [
            [*compiler, "-fPIC", *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)
        ]
        building._run([_Step(command, out) for command, out in zip(commands, objects, strict=True)], deadline)
        out = folder / name
        building._run([_Step([*compiler, "-shared", *map(str, objects), *flags, "-o", str(out)], out)], deadline)
    driver = folder / "driver"
    building._run([_Step([*compiler, str(DRIVER), "-ldl", "-o", str(driver)], driver)], deadline)
    return folder


@pytest.fixture
def call(compiled: Path, tmp_path: Path):
    """Call a function of the library in the emulator; tensors change in place."""

    def run(function: str, real: float, *arguments: Tensor | int | None) -> None:
        words, files = [], {}
        for number, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                files[number] = tmp_path / str(number)
                files[number].write_bytes(argument.contiguous().view(torch.uint8).numpy().tobytes())
                words.append(str(files[number]))
            else:
                words.append(str(int(argument or 0)))
        command = [
            str(EMULATOR),
            "-L",
            SYSTEM,
            compiled / "driver",
            compiled / "library.so",
            function,
            repr(real),
            *words,
        ]
        subprocess.run(command, check=True, timeout=600)
        for number, file in files.items():
            bytes_ = torch.from_numpy(np.frombuffer(file.read_bytes(), np.uint8).copy())
            arguments[number].view(torch.uint8).view(-1).copy_(bytes_)

    return run


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expect_near(found: Tensor, by_pytorch: Tensor, exact: Tensor) -> None:
    """At most four times the error of PyTorch in the same dtype, and its rounding."""
    error = (by_pytorch.double() - exact).abs().max()
    allowed = 4 * error + torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= allowed


def test_it_compiles_without_instructions_of_x86(compiled: Path):
    for name in ("library.so", "samplers.so"):
        machine = (compiled / name).read_bytes()[18:20]
        assert int.from_bytes(machine, "little") == 183  # EM_AARCH64


@needs_emulator
@every_dtype
def test_every_number_is_read_and_stored_as_it_is(dtype, call):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype) if dtype != torch.float32 else normal(2**16)
    zeros, stored = torch.zeros(2**16), torch.empty_like(numbers)
    rows = (1, 1, 2**16, 2**16, 2**16)
    call(
        "scatter_rows",
        0.0,
        PORTABLE,
        cpu.kind_of(dtype),
        stored,
        None,
        numbers,
        zeros.to(dtype),
        -zeros,
        *rows,
        THREADS,
    )
    kept = ~numbers.isnan()
    assert torch.equal(stored.isnan(), ~kept)
    assert torch.equal(stored[kept].view(torch.uint8), numbers[kept].view(torch.uint8))


@needs_emulator
@every_dtype
def test_float32_is_rounded_as_pytorch_does(dtype, call):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    near = normal(2**15) * 2.0 ** torch.randint(-27, 18, (2**15,), generator=generator)
    halfway = (near.view(torch.int32) // 2**13 * 2**13 + 0x1000).view(torch.float32)
    numbers = torch.cat([bits.view(torch.float32), near, halfway])
    n = len(numbers)
    zeros, stored = -torch.zeros(n, dtype=dtype), torch.empty(n, dtype=dtype)
    kind = PORTABLE, cpu.kind_of(dtype)
    call("scatter_rows", 0.0, *kind, stored, None, zeros, torch.ones_like(zeros), numbers, 1, 1, n, n, n, THREADS)
    torch.testing.assert_close(stored, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_emulator
@every_dtype
@pytest.mark.parametrize(("T", "C", "D"), [(3, 32, 7), (130, 70, 33)])
def test_a_linear_layer_is_the_plain_one_to_rounding(T, C, D, dtype, call):
    x, weight, bias = normal(T, C, dtype=dtype), normal(D, C, dtype=dtype, seed=1), normal(D, dtype=dtype, seed=2)
    layout, out, kind = cpu.layout_of(PORTABLE, dtype), torch.empty(T, D, dtype=dtype), (PORTABLE, cpu.kind_of(dtype))
    panels = cpu.panels(weight.t().unsqueeze(0), layout)
    call("linear", 0.0, *kind, x, panels, cpu.padded(bias.float(), layout.lanes), out, T, C, D, THREADS)
    by_pytorch, exact = F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    expect_near(out, by_pytorch, exact)
    if T <= 8:
        out.zero_()
        call("unpacked_linear", 0.0, *kind, x, weight, bias.float(), out, T, C, D, THREADS)
        expect_near(out, by_pytorch, exact)


@needs_emulator
@every_dtype
def test_attention_is_the_reference_and_appends_to_the_cache(dtype, call):
    R, H, K, T, P, d = 2, 2, 49, 60, 33, 70
    q, k, v = (normal(R, H, n, d, dtype=dtype, seed=n + s) for s, n in enumerate((K, T, T)))
    keys, values = (torch.full((R, H, P + T, d), torch.nan, dtype=dtype) for _ in range(2))
    keys[:, :, :P], values[:, :, :P] = F.normalize(normal(R, H, P, d), dim=-1), normal(R, H, P, d, seed=5)
    past = keys[:, :, :P].clone(), values[:, :, :P].clone()
    scale, out = normal(H).abs() + 1, torch.empty(R, K, H * d, dtype=dtype)
    strides = torch.tensor([t.stride()[:3] for t in (q, k, v, keys, values)])
    arguments = (q, k, v, keys, values, scale, out, strides, R, H, K, T, P, d, 1)
    call("subset_attention", 1.0, PORTABLE, cpu.kind_of(dtype), *arguments, 0, THREADS)
    wide = [t.double() for t in (q, k, v)], tuple(t.double() for t in past), scale.double()
    exact = attention_reference.subset_attention(*wide[0], *wide[1:], 1.0, None, None)
    by_pytorch = attention_reference.subset_attention(q, k, v, past, scale.to(dtype), 1.0, None, None)
    for found, plain, due in zip((out, keys, values), by_pytorch, exact, strict=True):
        expect_near(found, plain, due)


@needs_emulator
@every_dtype
def test_experts_are_those_of_the_reference(dtype, call):
    T, C, D, N = 70, 66, 60, 4
    u, mask = normal(T, C, dtype=dtype), normal(T, N, seed=1) > -0.5
    weights = [normal(D, C, seed=2) / C**0.5, normal(D, seed=3), normal(C, D, seed=4) / D**0.5, normal(C, seed=5)]
    weights = [weight.to(dtype) for weight in weights]
    out, packed = torch.empty_like(u), ffn_kernel.pack(*weights, N, dtype, PORTABLE)
    call("expert_ffn", 0.0, PORTABLE, cpu.kind_of(dtype), u, mask, *packed, out, T, C, N, D // N, THREADS)
    exact = ffn_reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    expect_near(out, ffn_reference.expert_ffn(u, mask, *weights), exact)


@needs_emulator
@every_dtype
def test_norms_are_those_of_float64(dtype, call):
    R, L, C = 2, 9, 65
    x, update = normal(R, L, C, dtype=dtype), normal(R, L, C, dtype=dtype, seed=1)
    vectors = [normal(R, 1, C, seed=seed) for seed in (2, 3, 4)]
    total, out = torch.empty_like(x), torch.empty_like(x)
    arguments = (x, None, update, *vectors, total, out, R, L, C, L * C, C, None, None, None, None, 0, 0)
    call("add_normalize", 1e-6, PORTABLE, cpu.kind_of(dtype), *arguments, THREADS)
    plain = [vector.to(dtype) for vector in vectors]
    by_pytorch = norm_reference.add_normalize(x, None, update, *plain)
    exact = norm_reference.add_normalize(x.double(), None, update.double(), *(v.double() for v in vectors))
    for found, known, due in zip((total, out), by_pytorch, exact, strict=True):
        expect_near(found, known, due)
    images, weight, bias = normal(2, 35, 48, dtype=dtype), normal(48, seed=6), normal(48, seed=7)
    out = torch.empty_like(images)
    call("group_norm_silu", 1e-6, PORTABLE, cpu.kind_of(dtype), images, weight, bias, out, 2, 35, 48, 3, 1, THREADS)
    exact = F.silu(F.group_norm(images.mT.double(), 3, weight.double(), bias.double(), 1e-6)).mT
    expect_near(out, exact.to(dtype), exact)
