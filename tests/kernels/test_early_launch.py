"""Programmatic dependent launch: which kernels wait before they touch memory, where it is on, and what is refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import actvar_kernels
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.operations.inputs import empty_inputs
from actvar_kernels.operations.shapes import BlockShape
from actvar_kernels.tools import compile_check
from actvar_kernels.tools.block_step import block_step
from actvar_kernels.tools.compile_check import Job, check
from actvar_kernels.tools.virtual import Launch, virtual_gpu, why_unavailable
from actvar_kernels.tools.virtual.resources import resources
from actvar_kernels.triton_backend import tuned_choices
from actvar_kernels.triton_backend.early_launch import begin, early_launch, using_early_launch
from actvar_kernels.triton_backend.tuning_table import Table, write_table

needs_virtual_gpu = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
SMALL = BlockShape(rows=2, tokens=16, keep=12, cached=14, width=256)


def launches(arch: int, early: bool | None, shape: BlockShape = SMALL) -> list[Launch]:
    """Return the launches of a block in bfloat16; with None as a measured table says."""
    with torch.no_grad(), virtual_gpu(arch) as gpu, using_backend("triton"):
        run = block_step(empty_inputs(shape, torch.bfloat16, "cuda"))
        gpu.launches.clear()
        if early is None:
            run()
        else:
            with using_early_launch(early):
                run()
        return gpu.launches


@needs_virtual_gpu
@pytest.mark.parametrize("arch", [90, 100])
def test_every_kernel_of_a_block_waits_before_it_reads_or_writes_and_lets_the_next_one_begin(arch: int):
    late, early = launches(arch, False), launches(arch, True)
    assert [launch.name for launch in early] == [launch.name for launch in late], "as many launches, in the same order"
    for before, after in zip(late, early, strict=True):
        assert (before.kernel is None) == (after.kernel is None)
        if after.kernel is None:  # PyTorch's
            continue
        assert after.kernel.early
        assert not before.kernel.early
        found = resources(after.kernel)
        assert found.before_wait is not None
        assert not set(found.before_wait) & {"LDG", "STG", "LDGSTS", "UTMALDG", "EXIT"}
        assert (found.instructions["ACQBULK"], found.instructions["PREEXIT"]) == (1, 1)
        assert found.stack == found.local == 0
        assert not resources(before.kernel).instructions.keys() & {"ACQBULK", "PREEXIT"}
        assert [*compile_check.faults(after.kernel), *compile_check.faults(before.kernel)] == []


@needs_virtual_gpu
@pytest.mark.parametrize("arch", [80, 89, "gfx942"])
def test_gpus_without_it_get_no_such_code_and_refuse_to_be_asked(arch):
    for launch in launches(arch, None):
        if launch.kernel is not None:
            assert not launch.kernel.early
            assert resources(launch.kernel).before_wait is None
    with pytest.raises(ValueError, match=r"using_early_launch\(True\): expected a GPU of sm_90 or newer, got cuda"):
        launches(arch, True)


def test_a_cpu_refuses_to_be_asked():
    with using_early_launch(True), pytest.raises(ValueError, match="got cpu"):
        early_launch(torch.zeros(1))
    assert early_launch(torch.zeros(1)) == {"PDL": False}


@needs_virtual_gpu
def test_a_measured_table_turns_it_on(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    path = tmp_path / "tuned.json"
    assert not any(launch.kernel.early for launch in launches(90, None) if launch.kernel is not None)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    for early in (0, 1):
        write_table(Table("NVIDIA H100 80GB HBM3", 90, "3.7.1", (), early_launch=early), path)
        tuned_choices._table.cache_clear()
        found = {launch.kernel.early for launch in launches(90, None) if launch.kernel is not None}
        assert found == {bool(early)}


def test_every_kernel_that_may_be_launched_early_begins_with_the_wait():
    """A kernel that touched memory first, or did not wait, could meet what an earlier kernel has yet to write."""
    kernels = 0
    for path in Path(actvar_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and "PDL" in {argument.arg for argument in node.args.args}:
                if node.name in ("begin", "fetch_ahead"):
                    continue
                first, *rest = node.body[1:] if ast.get_docstring(node) else node.body
                if ast.unparse(first).startswith("fetch_ahead(weight_ptr, "):
                    first, *_ = rest
                assert ast.unparse(first) == "begin(PDL)", f"{path}: {node.name}"
                kernels += 1
    assert kernels == 16


@triton.jit
def hasty(x_ptr, PDL: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 128))
    begin(PDL)
    tl.store(x_ptr + tl.arange(0, 128), x + 1.0)


@triton.jit
def careless(x_ptr, PDL: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, 128), 1.0)


@triton.jit
def choosy(x_ptr, count, PDL: tl.constexpr):
    if tl.program_id(0) < count:
        begin(PDL)
        tl.store(x_ptr + tl.arange(0, 128), 1.0)


@needs_virtual_gpu
@pytest.mark.parametrize(
    ("kernel", "arguments", "options", "fault"),
    [
        pytest.param(hasty, (), dict(PDL=True, launch_pdl=True), "LDG can run before the wait", id="reads first"),
        pytest.param(
            careless, (), dict(PDL=False, launch_pdl=True), "is launched early, and never waits", id="never waits"
        ),
        pytest.param(choosy, (3,), dict(PDL=True, launch_pdl=True), "EXIT can run before the wait", id="waits in some"),
        pytest.param(careless, (), dict(PDL=False), None, id="launched late"),
        pytest.param(hasty, (), dict(PDL=True), "waits for the kernels ahead, and is not", id="waits for nothing"),
    ],
)
def test_the_compile_check_finds_a_kernel_that_does_not_wait(monkeypatch, kernel, arguments, options, fault):
    def run() -> None:
        kernel[(4,)](torch.empty(128, device="cuda"), *arguments, **options)

    monkeypatch.setattr(compile_check, "cases", lambda *_: [("toy", run)])
    (row,) = check([Job(90, "d16", 1, "bf16")], processes=1)
    assert len(row.faults) == (fault is not None)
    assert all(re.search(fault, found) for found in row.faults), row.faults
