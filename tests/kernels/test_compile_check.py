"""The compile check: which machine code it passes, which it does not, and its command line."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import actvar_kernels
from actvar_kernels.linear import triton_few_rows
from actvar_kernels.linear.tiles import FewRowsTiles
from actvar_kernels.operations import shapes
from actvar_kernels.tools import compile_cases, compile_check
from actvar_kernels.tools.compile_check import Job, Row, check, main
from actvar_kernels.tools.virtual import why_unavailable

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    acc = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, BLOCK, num_stages=STAGES):
        a = tl.load(a_ptr + rows[:, None] * K + (k + depth)[None, :])
        b = tl.load(b_ptr + (k + depth)[:, None] * N + columns[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], acc)


def product(M: int, N: int, block: int, stages: int, warps: int, dtype: torch.dtype = torch.bfloat16) -> None:
    a, b = torch.empty(M, 512, dtype=dtype, device="cuda"), torch.empty(512, N, dtype=dtype, device="cuda")
    c = torch.empty(M, N, device="cuda")
    product_kernel[(1,)](a, b, c, 512, M=M, N=N, BLOCK=block, STAGES=stages, num_warps=warps)


def products_side_by_side(stages: int) -> None:
    x, weight = (torch.empty(*sizes, dtype=torch.bfloat16, device="cuda") for sizes in ((1, 2, 512), (64, 512)))
    tile = FewRowsTiles(rows=16, columns=32, step=16, parts=4, warps=4, stages=stages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_few_rows, "norm_linear_tiles", lambda *_: tile)
        triton_few_rows.norm_linear(x, x[:, :1], x[:, :1], weight, weight[:, 0], with_gelu=False)


def broken() -> None:
    raise TypeError("first line\nlast line")


def checked(monkeypatch: pytest.MonkeyPatch, arch: int, run) -> list[Row]:
    monkeypatch.setattr(compile_check, "cases", lambda *_: [("toy", run)])
    return check([Job(arch, "d16", 1, "bf16")], processes=1)


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_good_kernel_passes_on_every_kind_of_tensor_core(monkeypatch, arch, instruction):
    (row,) = checked(monkeypatch, arch, lambda: product(64, 64, 64, stages=3, warps=4))
    assert row.faults == ()
    assert row.loop[instruction] > 0
    assert row.loop["LDGSTS"] > 0
    assert (row.kernel, row.arch, row.spilled) == ("product_kernel", arch, 0)
    assert row.registers > 0
    assert "M=64 N=64 BLOCK=64" in row.configuration


@pytest.mark.parametrize(("arch", "instruction"), [("gfx942", "v_mfma"), ("gfx1100", "v_wmma")])
def test_a_good_kernel_passes_on_the_matrix_cores_of_amd(monkeypatch, arch, instruction):
    (row,) = checked(monkeypatch, arch, lambda: product(64, 64, 64, stages=2, warps=4))
    assert row.faults == ()
    assert sum(count for name, count in row.loop.items() if name.startswith(instruction)) > 0
    assert (row.kernel, row.arch, row.spilled) == ("product_kernel", arch, 0)


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (lambda: product(256, 256, 16, stages=2, warps=2), r"spills \d+ bytes per thread"),
        (lambda: product(128, 128, 256, stages=2, warps=8), r"\d+ bytes of shared memory, of 65536"),
    ],
    ids=["spills", "too much shared memory"],
)
def test_a_bad_kernel_for_amd_is_a_failure(monkeypatch, run, fault):
    (row,) = checked(monkeypatch, "gfx942", run)
    assert any(re.fullmatch(fault, found) for found in row.faults), row.faults


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (lambda: product(128, 128, 16, stages=2, warps=1), r"spills \d+ bytes per thread"),
        (lambda: product(128, 128, 128, stages=4, warps=8), r"\d+ bytes of shared memory, of 166912"),
        (lambda: product(64, 64, 64, stages=1, warps=4), "no asynchronous copy in the main loop"),
        (lambda: products_side_by_side(stages=1), "no asynchronous copy in the main loop"),
        (lambda: torch.zeros(1, device="cuda"), "launched no Triton kernel"),
        (broken, "TypeError: last line"),
    ],
    ids=[
        "spills",
        "too much shared memory",
        "waits for its loads",
        "so do products side by side",
        "another backend",
        "does not compile",
    ],
)
def test_a_bad_kernel_is_a_failure_that_says_why(monkeypatch, run, fault):
    (row,) = checked(monkeypatch, 80, run)
    (found,) = row.faults
    assert re.fullmatch(fault, found), found


def test_float32_needs_no_tensor_cores(monkeypatch):
    (row,) = checked(monkeypatch, 80, lambda: product(32, 32, 32, stages=2, warps=4, dtype=torch.float32))
    assert row.faults == ()
    assert not any("MMA" in name for name in row.loop)


def test_the_cases_call_every_operation():
    names = {name.split()[0] for name, _ in meta_cases()}
    found = {name for name in actvar_kernels.__all__ if has_triton_kernel(getattr(actvar_kernels, name))}
    assert names == found - {"linear_once"}  # whose product is PyTorch's alone


def has_triton_kernel(exported: object) -> bool:
    """Return whether an exported name is an operation with a Triton kernel in its folder."""
    folder, _, file = getattr(exported, "__module__", "").rpartition(".")
    files = ("op", "linears", "few_rows", "codes")
    is_operation = callable(exported) and not isinstance(exported, type) and file in files
    kernel = "triton_kernel" if file == "op" else f"triton_{file}"
    return is_operation and importlib.util.find_spec(f"{folder}.{kernel}") is not None


def meta_cases() -> list:
    with torch.device("meta"):
        empty = torch.empty
        empty(0)  # torch lists its functions at the first call in such a context, and must not find the patched one
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **{**kwargs, "device": "meta"}))
            patch.setattr(compile_cases, "why_not_in_eight_bits", lambda *_: None)
            return list(compile_cases.cases("d16", 1, torch.bfloat16))


def test_the_shapes_are_those_of_the_official_models():
    assert shapes.MODELS["d16"].active_scales() == ((169, 127, 255), (256, 192, 382))
    assert shapes.MODELS["d36"].active_scales() == ((576, 432, 640), (1024, 768, 1072))


def test_the_command_prints_a_table_and_fails_when_a_kernel_does(monkeypatch, capsys, tmp_path):
    runs = [("good", lambda: product(64, 64, 64, 3, 4)), ("bad", broken)]
    monkeypatch.setattr(compile_check, "cases", lambda *_: runs)
    file = tmp_path / "rows.json"
    arguments = ["--arch", "80", "--models", "d16", "--quick", "--processes", "1", "--json", str(file)]
    assert main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "2 kernels on sm_80: 1 failures"
    assert [row["faults"] for row in json.loads(file.read_text())] == [["TypeError: last line"], []]
    monkeypatch.setattr(compile_check, "cases", lambda *_: runs[:1])
    assert main(arguments) == 0


@pytest.mark.parametrize("arguments", [["--arch", "75"], ["--models", "d17"], ["--quick", "--arch", "100"]])
def test_a_mistake_on_the_command_line_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
