"""The table of who runs what on a CPU: written, read, refused, and used by `auto` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_var, sample

from actvar import apply_patch
from actvar_kernels import scatter_rows
from actvar_kernels.backend import backend_of, using_backend
from actvar_kernels.cpu_backend import choices, cpu
from actvar_kernels.cpu_backend.choices import Choice, Table, read_table, write_table
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.operations.table import BLOCK, DECODER, SAMPLING
from actvar_kernels.scatter import op as scatter

CHOICE = Choice("scatter_rows", "float32", 0, "reference", "reference")
needs_cpp = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


def table(*found: Choice) -> Table:
    return Table(choices.processor(), choices.instructions(), 2, found)


def content(**changes) -> dict:
    return {"kind": "cpu"} | table()._asdict() | {"choices": [CHOICE._asdict()]} | changes


def of_choice(**changes) -> dict:
    return content(choices=[CHOICE._asdict() | changes])


@pytest.fixture
def in_force(tmp_path, monkeypatch):
    """Return a function that puts a table in force, which ends with the test."""

    def put(*found: Choice) -> Path:
        write_table(table(*found), tmp_path / "table.json")
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "table.json"))
        choices.in_force.cache_clear()
        return tmp_path / "table.json"

    yield put
    choices.in_force.cache_clear()


def scattered(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.ones(1, 2, 8, dtype=dtype)
    return scatter_rows(torch.zeros(1, 3, 8, dtype=dtype), torch.tensor([[0, 2]]), rows, rows, torch.ones(1, 1, 8))


def runs(monkeypatch) -> list[str]:
    """Return a list that gets the name of the backend of each call of `scatter_rows`."""
    found = []
    choose = scatter._choose

    def noted(*tensors):
        backend = choose(*tensors)
        found.append(backend.name)
        return backend

    monkeypatch.setattr(scatter, "_choose", noted)
    return found


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "table.json"
    written = table(CHOICE, CHOICE._replace(dtype="bfloat16", limit=100, above="cpu"))
    write_table(written, path)
    assert read_table(path) == written
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["kind"] == "cpu"


BAD = {
    "another kind": (content(kind="tpu"), "kind: expected 'cpu', as actvar bench .* or 'gpu', .* got 'tpu'"),
    "a field too many": (content(more=1), "expected an object with processor, isa, threads, choices, got"),
    "threads as text": (content(threads="2"), "threads: got '2'"),
    "choices that are none": (content(choices={}), "choices: got {}"),
    "a choice that is none": (content(choices=[1]), r"choices\[0\]: expected an object .* got int"),
    "an operation without a kernel": (of_choice(operation="add_residual"), "operation: expected one of .* got 'add_r"),
    "another dtype": (of_choice(dtype="float64"), "dtype: expected one of float32, bfloat16, float16, got 'float64'"),
    "another backend": (of_choice(below="triton"), "below: expected one of cpu, reference, got 'triton'"),
    "a limit below 0": (of_choice(limit=-1), "limit: expected 0 or more, got -1"),
    "a choice twice": (content(choices=[CHOICE._asdict()] * 2), "expected one choice .* got several"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_is_not_right_is_refused(case, tmp_path):
    found, message = BAD[case]
    (tmp_path / "table.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "table.json")


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "table.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="expected JSON as"):
        read_table(tmp_path / "table.json")


def test_a_table_of_tiles_says_nothing_about_a_cpu(tmp_path):
    pytest.importorskip("triton")
    from actvar_kernels.triton_backend import tuning_table

    path = tmp_path / "table.json"
    tuning_table.write_table(tuning_table.Table("NVIDIA H100 80GB HBM3", 90, "3.7.1", ()), path)
    assert read_table(path) is None
    write_table(table(CHOICE), path)
    assert tuning_table.read_table(path) is None


@needs_cpp
def test_a_table_overrules_auto_for_its_operation_and_dtype_and_nothing_else(in_force, monkeypatch):
    found = runs(monkeypatch)
    without = scattered()
    in_force(CHOICE)
    with using_backend("auto"):
        torch.testing.assert_close(scattered(), without)
        scattered(torch.bfloat16)
        u = torch.ones(1, 8)
        assert backend_of("route_experts", u, why_not_in_cpp=lambda: None) == "cpu"
    with using_backend("cpu"):
        scattered()
    assert found == ["cpu", "reference", "cpu", "cpu"]


@needs_cpp
def test_a_limit_counts_the_numbers_of_the_first_tensor(in_force):
    in_force(CHOICE._replace(limit=100, above="cpu"))
    small, large = torch.ones(99), torch.ones(10, 10)
    assert backend_of("scatter_rows", small, why_not_in_cpp=lambda: None) == "reference"
    assert backend_of("scatter_rows", large, why_not_in_cpp=lambda: None) == "cpu"


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_draws_with_every_operation_left_to_pytorch(dtype, in_force):
    var = apply_patch(make_tiny_var().to(dtype))
    expected = sample(var)
    for operation in choices.OPERATIONS:
        in_force(*(Choice(operation, name, 0, "reference", "reference") for name in choices.DTYPES))
        assert sample(var).shape == expected.shape
    in_force(*(Choice(name, of, 0, "reference", "reference") for name in choices.OPERATIONS for of in choices.DTYPES))
    drawn = sample(var)
    if dtype == torch.float32:  # in bfloat16 rounding may draw another token
        torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)


def test_a_table_of_another_processor_is_refused(in_force):
    path = in_force()
    write_table(table()._replace(processor="Z80"), path)
    with pytest.raises(ValueError, match=r"was measured on Z80, .* run actvar bench --out here"):
        choices.in_force()


@needs_cpp
def test_a_table_made_with_amx_is_refused_without_it(in_force, monkeypatch):
    monkeypatch.setattr(cpu, "has_tiles", lambda: True)
    in_force(CHOICE)
    assert choices.in_force()
    choices.in_force.cache_clear()
    monkeypatch.setattr(cpu, "has_tiles", lambda: False)
    with pytest.raises(ValueError, match=r"was measured on .* and AMX; this is .* run actvar bench --out here"):
        choices.in_force()


def test_the_table_is_described_in_one_line(in_force, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert choices.description() == "C++ wherever it takes a call (ACTVAR_TUNED names no table of a CPU)"
    path = in_force(CHOICE, CHOICE._replace(dtype="bfloat16", limit=100, below="cpu"))
    expected = "PyTorch for scatter_rows float32, scatter_rows bfloat16 from 100 numbers on; C++ for the rest"
    assert choices.description() == f"{expected}, by {path}"


def test_every_operation_with_a_cpp_kernel_may_be_chosen():
    names = [operation.name for operation in (*BLOCK, *SAMPLING, *DECODER)]
    on_triton_alone = {"rotate_heads", "add_residual", "add_residual_moments"}
    assert [name for name in names if name not in on_triton_alone] == list(choices.OPERATIONS)
