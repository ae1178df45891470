"""`actvar bench`: its verdict, rows and table, by times that are made up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from actvar.cli import main
from actvar.reports import here
from actvar.reports.here import Case, Row
from actvar_kernels.cpu_backend import brgemm, choices, cpu

CASES = [Case("block", "d16", 1, "float32"), Case("scatter_rows", "d16", 1, "float32")]
needs_cpp = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


def row(ratio: float, numbers: int = 1, noise: float = 0.01) -> Row:
    return Row("scatter_rows", "d16", 1, "float32", numbers, ratio, 1.0, ratio, noise)


@pytest.fixture
def ratios(monkeypatch):
    """Return a list of made-up ratios, the next of which every measurement takes."""
    found: list[float] = []

    def measure(_run, _seconds, _least, _most):
        ratio = found.pop(0)
        return {"cpu": [ratio, ratio, ratio], "reference": [1.0, 1.0, 1.0]}

    monkeypatch.setattr(here, "cases", lambda: CASES)
    monkeypatch.setattr(here, "load", lambda: 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(here, "measure", measure)
    monkeypatch.setattr(Case, "prepared", lambda case: (lambda: 0.0, 0 if case.operation == "block" else 7))
    return found


@needs_cpp
@pytest.mark.parametrize(
    ("made_up", "code", "last"),
    [
        ([0.5, 1.05], 0, "2 cases: kernels faster in 1, over 10 % slower in 0"),
        ([0.5, 1.5, 1.0], 0, "2 cases: kernels faster in 1, over 10 % slower in 0"),
        ([0.5, 1.5, 1.2], 1, "2 cases: kernels faster in 1, over 10 % slower in 1"),
    ],
    ids=["fast", "slow by chance", "slow again"],
)
def test_the_exit_code_tells_whether_anything_was_slower_twice(made_up, code, last, ratios, capsys):
    ratios += made_up
    if code:
        with pytest.raises(SystemExit) as raised:
            main(["bench"])
        assert raised.value.code == code
    else:
        main(["bench"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last
    assert [line.endswith("  slower") for line in lines] == [False, False, bool(code), False]
    assert ratios == []


def test_what_is_within_noise_is_no_verdict():
    noisy = row(1.3, noise=0.4)
    assert (noisy.is_over, noisy.is_slower) == (True, False)
    assert noisy.line().endswith("slower, within noise")
    assert here.summary([noisy, row(0.5)], 3).startswith("2 cases: kernels faster in 1, over 10 % slower in 0 (1 more")
    assert here.summary([noisy], 3).endswith("; 2 left out after 100 s")


def test_work_that_came_between_is_no_verdict():
    assert replace(row(3.7), best=1.1).is_slower is False
    assert here.table_of([replace(row(3.7), best=0.9)]).choices[0][2:] == (0, "cpu", "cpu")


def test_noise_is_the_spread_of_the_pairs():
    found = here.row_of(CASES[1], 7, {"cpu": [0.001, 0.002, 0.003], "reference": [0.001, 0.001, 0.001]})
    assert (found.kernels, found.pytorch, found.best, found.numbers) == (2.0, 1.0, 1.0, 7)
    assert found.noise == pytest.approx(0.6)


@needs_cpp
def test_the_files_have_all_rows_the_machine_and_a_table(ratios, tmp_path):
    ratios += [0.5, 2.0, 2.0]
    with pytest.raises(SystemExit):
        main(["bench", "--json", str(tmp_path / "rows.json"), "--out", str(tmp_path / "table.json")])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["machine"].keys() == {"processor", "isa", "threads", "actvar", "torch", "load"}
    assert [of["operation"] for of in found["rows"]] == ["block", "scatter_rows"]
    expected = {"operation", "model", "batch", "dtype", "numbers", "kernels", "pytorch", "best", "noise"}
    expected |= {"plain", "ratio", "slower"}
    assert all(of.keys() == expected for of in found["rows"])
    assert [of["slower"] for of in found["rows"]] == [False, True]
    written = choices.read_table(tmp_path / "table.json")
    assert written is not None
    assert written.choices == (choices.Choice("scatter_rows", "float32", 0, "reference", "reference"),)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "table.json"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([row(0.5, 10), row(0.9, 1000)], (0, "cpu", "cpu"), id="C++ everywhere"),
        pytest.param([row(2, 10), row(1.2, 1000)], (0, "reference", "reference"), id="PyTorch everywhere"),
        pytest.param([row(2, 10), row(0.5, 1000)], (100, "reference", "cpu"), id="PyTorch where it is small"),
        pytest.param([row(0.5, 10), row(2, 1000)], (100, "cpu", "reference"), id="PyTorch where it is large"),
        pytest.param([row(1.3, 10, noise=0.5), row(0.5, 1000)], (0, "cpu", "cpu"), id="noise counts for nothing"),
    ],
)
@needs_cpp
def test_the_table_takes_what_was_faster(rows, expected):
    assert [choice[2:] for choice in here.table_of(rows).choices] == [expected]


@pytest.mark.parametrize(
    ("dtype", "multiplied", "plain"),
    [
        ("float32", (), "float32"),
        ("bfloat16", ("bfloat16",), "bfloat16"),
        ("float16", ("bfloat16",), "float32"),
        ("float16", ("bfloat16", "float16"), "float16"),
        ("int8", ("bfloat16",), "bfloat16"),
        ("int8", (), "float32"),
    ],
)
def test_pytorch_runs_in_a_dtype_that_the_processor_multiplies(dtype, multiplied, plain, monkeypatch):
    for name in ("bfloat16", "float16"):
        monkeypatch.setattr(cpu, f"multiplies_{name}", lambda found=name in multiplied: found)
    assert Case("block", "d16", 1, dtype).plain == plain


@needs_cpp
@pytest.mark.parametrize("has_bytes", [True, False])
def test_blocks_are_timed_in_eight_bits_where_the_processor_multiplies_them(has_bytes, monkeypatch):
    monkeypatch.setattr(here.brgemm, "runs", lambda dtype: has_bytes and dtype == torch.int8)
    timed = {(case.operation, case.dtype) for case in here.cases()}
    assert ((("block", "int8") in timed), ("scatter_rows", "int8") in timed) == (has_bytes, False)
    assert {("block", "float16"), ("scatter_rows", "float16"), ("scatter_rows", "float32")} <= timed


@pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")
def test_a_block_in_eight_bits_runs_beside_one_in_the_dtype_of_pytorch(monkeypatch):
    seen = []
    monkeypatch.setattr(here, "last_scale_seconds", lambda *given: seen.append(given) or 1.0)
    case = Case("block", "fashion-mnist", 1, "int8")
    runs, numbers = case.prepared()
    assert [runs["cpu"](), runs["reference"](), numbers] == [1.0, 1.0, 0]
    common = ("ActVAR", "fashion-mnist", 1, "cpu", choices.DTYPES[case.plain])
    assert seen == [(*common, "int8"), common]


def test_no_choice_is_made_from_another_dtype(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_float16", lambda: False)
    assert here.table_of([replace(row(2.0), dtype="float16")]).choices == ()


def test_a_busy_machine_is_named():
    assert here.warning(1000.0).startswith("other work is at it (load 1000.0 on ")
    assert here.warning(-1000.0) == ""


def test_what_begins_too_late_is_left_out(ratios):
    assert list(here.measured(CASES, seconds=-1.0)) == []


@pytest.mark.parametrize("arguments", [["--out"], ["--json", "/"], ["--more"]], ids=" ".join)
def test_wrong_arguments_are_exit_code_2(arguments, ratios, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["bench", *arguments])
    assert raised.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@needs_cpp
@pytest.mark.parametrize("operation", choices.OPERATIONS)
def test_the_numbers_of_a_case_are_those_that_the_choice_sees(operation, monkeypatch):
    seen = []

    def noted(named, first):
        seen.append((named, first.numel()))
        return "cpu"

    monkeypatch.setattr(choices, "in_force", lambda: {"": None})
    monkeypatch.setattr(choices, "what_runs", noted)
    case = Case(operation, "fashion-mnist", 1, "float32")
    monkeypatch.setattr(here, "mean_seconds", lambda run, _device: run())
    runs, numbers = case.prepared()
    with torch.no_grad():
        runs["cpu"]()
    assert seen[0] == (operation, numbers)  # parts of it may choose as well


def test_a_row_is_its_case_and_its_figures():
    assert asdict(row(2.0)).keys() - asdict(CASES[0]).keys() == {"numbers", "kernels", "pytorch", "best", "noise"}
