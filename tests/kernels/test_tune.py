"""The tuning command: its table written, read, refused and used; what it times where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from actvar_kernels import subset_attention
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3.op import conv3x3
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.linear.few_rows import few_rows_pay
from actvar_kernels.operations.inputs import empty_inputs
from actvar_kernels.tools import tune
from actvar_kernels.tools.virtual import virtual_gpu, why_unavailable
from actvar_kernels.triton_backend.few_rows import using_few_rows
from actvar_kernels.triton_backend.tiles import expert_ffn_candidates
from actvar_kernels.triton_backend.tuned_choices import tuned_conv3x3
from actvar_kernels.triton_backend.tuning_table import (
    SCHEDULES,
    AttentionEntry,
    ConvEntry,
    Entry,
    FewRowsEntry,
    Table,
    read_table,
    write_table,
)

ENTRY = Entry("bfloat16", 384, 1024, 256, "tile_list", 64, 64, 0.02)
CONVOLUTION = ConvEntry("bfloat16", 32, 32, 320, 160, 0, 8, 128, 0.03)
CONVOLUTIONS = (CONVOLUTION, CONVOLUTION._replace(images=64, pixels=64), CONVOLUTION._replace(fused=1, pixels=0))
FEW_ROWS = FewRowsEntry("bfloat16", 1024, 4096, 8, 1, 0.02)
ATTENTION = AttentionEntry("bfloat16", 64, 192, 574, 32, 128, 32, 0.04)
TABLE = Table(
    "NVIDIA H100 80GB HBM3",
    90,
    "3.7.1",
    (ENTRY, ENTRY._replace(tokens=3072, rows=128, columns=256)),
    CONVOLUTIONS,
    (ATTENTION, ATTENTION._replace(heads=256, tile_queries=64, tile_keys=64)),
    (FEW_ROWS, FEW_ROWS._replace(rows=50, fused=0)),
    early_launch=1,
)

LISTS = ("expert_ffn", "conv3x3", "attention", "few_rows")

needs_virtual_gpu = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def content(**changes) -> dict:
    lists = {name: [entry._asdict() for entry in getattr(TABLE, name)] for name in LISTS}
    return TABLE._asdict() | lists | changes


def entries(**changes) -> dict:
    return content(expert_ffn=[ENTRY._asdict() | changes])


def convolutions(**changes) -> dict:
    return content(conv3x3=[CONVOLUTION._asdict() | changes])


def few_rows(**changes) -> dict:
    return content(few_rows=[FEW_ROWS._asdict() | changes])


def attention(**changes) -> dict:
    return content(attention=[ATTENTION._asdict() | changes])


def test_a_table_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "tuned.json"
    write_table(TABLE, path)
    assert read_table(path) == TABLE
    assert list(tmp_path.iterdir()) == [path]


BAD = {
    "no object": (
        [],
        "expected an object with device, capability, triton, expert_ffn, .*, few_rows, early_launch, got list",
    ),
    "a field too few": ({"device": "x"}, "got device"),
    "a field too many": (content(more=1), "got attention, capability, .*, expert_ffn, few_rows, more, triton"),
    "a capability that is not supported": (content(capability=75), "capability: expected one of 80"),
    "a capability as text": (content(capability="90"), "capability: got '90'"),
    "entries that are none": (content(expert_ffn={}), "expert_ffn: got {}"),
    "an entry that is none": (content(expert_ffn=[1]), r"expert_ffn\[0\]: expected an object .* got int"),
    "another type": (entries(dtype="int8"), "dtype: expected float32, float16 or bfloat16, got 'int8'"),
    "no tokens": (entries(tokens=0), "above 0"),
    "tokens as truth value": (entries(tokens=True), "tokens: got True"),
    "a schedule that was removed": (entries(schedule="snap"), "schedule: expected one of dense, tile_list"),
    "tiles that are not shipped": (entries(rows=32), r"expected one of \[\(128, 256\), .*got \(32, 64\)"),
    "a convolution of another type": (convolutions(dtype="int8"), r"conv3x3\[0\]: dtype: expected float32"),
    "no images": (convolutions(images=0), r"conv3x3\[0\]: expected height, .* above 0"),
    "an epilogue that is none": (convolutions(fused=2), "fused: expected 0 or 1, got 2"),
    "pixels that are not shipped": (convolutions(pixels=256), r"pixels: expected one of \[0, 128, 64\], got 256"),
    "a convolution twice": (content(conv3x3=[CONVOLUTION._asdict()] * 2), "conv3x3: expected one entry"),
    "attention without heads": (attention(heads=0), r"attention\[0\]: expected head_dim, .* above 0"),
    "queries that are not shipped": (
        attention(tile_keys=16),
        r"tile_queries, tile_keys: .*\(128, 32\)\], got \(128, 16\)",
    ),
    "attention twice": (content(attention=[ATTENTION._asdict()] * 2), "attention: expected one entry"),
    "a block without rows": (few_rows(rows=0), r"few_rows\[0\]: expected channels, hidden and rows above 0"),
    "a block by half": (few_rows(fused=2), "fused: expected 0 or 1, got 2"),
    "a block twice": (content(few_rows=[FEW_ROWS._asdict()] * 2), "few_rows: expected one entry"),
    "early launches by half": (content(early_launch=2), "early_launch: expected 0 or 1 on sm_90, got 2"),
    "early launches of an older GPU": (
        Table("A100", 80, "3.7.1", (), early_launch=1)._asdict() | {name: [] for name in LISTS},
        "early_launch: expected 0 on sm_80, got 1",
    ),
    "a shape twice": (content(expert_ffn=[ENTRY._asdict()] * 2), "got several"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_is_not_right_is_refused(case: str, tmp_path: Path):
    found, message = BAD[case]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path):
    path = tmp_path / "tuned.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="expected JSON"):
        read_table(path)


def launched(tokens: int) -> tuple[int, int]:
    """Launches of an expert FFN, and the rows of its tiles."""
    with torch.no_grad(), virtual_gpu(90) as gpu:
        tune._call(tokens, 1024, torch.bfloat16, torch.device("cuda"))("auto")
        names = [launch.name for launch in gpu.launches if launch.name in ("_sort_rows", "_up", "_down")]
        return len(names), gpu.launches[-1].kernel.constants["BLOCK_T"]


@needs_virtual_gpu
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param(384, (3, 64), id="the shape of an entry"),
        pytest.param(700, (3, 64), id="less than twice as many"),
        pytest.param(150, (1, 64), id="less than half: no entry"),
        pytest.param(4000, (3, 128), id="nearer to another entry"),
    ],
)
def test_calls_take_the_nearest_entry(tokens: int, expected: tuple[int, int], tmp_path: Path, monkeypatch):
    write_table(TABLE, tmp_path / "tuned.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
    assert launched(tokens) == expected


@needs_virtual_gpu
def test_without_a_table_nothing_changes(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert launched(384) == (1, 64)


@needs_virtual_gpu
def test_a_table_of_another_gpu_is_refused(tmp_path: Path, monkeypatch):
    table = Table("NVIDIA A100", 80, "3.7.1", (ENTRY._replace(columns=64, rows=64),))
    write_table(table, tmp_path / "tuned.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
    with pytest.raises(ValueError, match=r"was measured on NVIDIA A100, sm_80; this is .* sm_90"):
        launched(384)


def queries_of_tile(heads: int, cached: int = 382, masked: bool = False) -> int:
    """Return the queries of a tile of attention in bfloat16, of 192 queries and as many own keys."""
    with torch.no_grad(), virtual_gpu(90) as gpu, using_backend("triton"):
        q, k, v = (torch.empty(2, heads // 2, 192, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        past = (torch.empty(2, heads // 2, cached, 64, dtype=torch.bfloat16, device="cuda"),) * 2
        mask = torch.empty(1, 1, 192, cached + 192, dtype=torch.bfloat16, device="cuda") if masked else None
        subset_attention(q, k, v, past, None, 1.0, mask, keep_cache=False)
        return gpu.launches[-1].kernel.constants["BLOCK_Q"]


@needs_virtual_gpu
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param((32,), 128, id="the shape of an entry"),
        pytest.param((40,), 128, id="less than twice as many heads"),
        pytest.param((200,), 64, id="nearer to another entry"),
        pytest.param((8,), 64, id="less than half: no entry"),
        pytest.param((32, 383), 64, id="other keys: no entry"),
        pytest.param((32, 382, True), 64, id="a mask"),
    ],
)
def test_attention_takes_the_nearest_entry(call: tuple, expected: int, tmp_path: Path, monkeypatch):
    write_table(TABLE, tmp_path / "tuned.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
    assert queries_of_tile(*call) == expected


@needs_virtual_gpu
def test_the_fastest_tiles_of_attention_are_chosen(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    times, tried = iter([3.0, 2.5, 2.0]), []
    with torch.no_grad(), virtual_gpu(90) as gpu:

        def time(run) -> float:
            gpu.launches.clear()
            run()
            (launch,) = [launch for launch in gpu.launches if launch.kernel is not None]
            tried.append((launch.kernel.constants["BLOCK_Q"], launch.kernel.constants["BLOCK_K"]))
            return next(times)

        todo = [tune.AttentionCall(heads=32, queries=192, cached=382, own=192)]
        found = list(tune.measure_attention(todo, torch.bfloat16, torch.device("cuda"), time))
    assert tried == [(64, 64), (128, 64), (128, 32)]
    assert found == [ATTENTION._replace(milliseconds=2.0)]


def test_calls_of_attention_are_those_of_the_last_two_scales_sparse_and_dense():
    calls = tune.attention_calls(["d16"], [1])
    assert [call[1:] for call in calls] == [(127, 255, 127), (169, 255, 169), (192, 382, 192), (256, 424, 256)]
    assert {call.heads for call in calls} == {32}


@needs_virtual_gpu
def test_a_block_is_timed_launched_late_and_early(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    times, tried = iter([3.0, 2.0]), []
    monkeypatch.setattr(tune, "random_inputs", empty_inputs)
    with torch.no_grad(), virtual_gpu(90) as gpu:

        def time(run) -> float:
            gpu.launches.clear()
            run()
            tried.append({launch.kernel.early for launch in gpu.launches if launch.kernel is not None})
            return next(times)

        found = list(tune.measure_launches(["d16"], [1], torch.bfloat16, torch.device("cuda"), time))
    assert tried == [{False}, {True}]
    assert found == [tune.LaunchTimes("d16", 1, 3.0, 2.0)]
    assert tune.early_launch_is_faster(found)
    assert not tune.early_launch_is_faster([*found, tune.LaunchTimes("d16", 8, 2.0, 3.5)])
    assert not tune.early_launch_is_faster([])


@needs_virtual_gpu
def test_a_dense_block_is_timed_in_seven_and_in_five_launches(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    times, tried = iter([3.0, 2.0] * 4 + [2.0, 3.0]), []
    monkeypatch.setattr(tune, "random_inputs", empty_inputs)
    with torch.no_grad(), virtual_gpu(90) as gpu:

        def time(run) -> float:
            gpu.launches.clear()
            run()
            tried.append(sum(launch.launches for launch in gpu.launches))
            return next(times)

        models = ["d16", "d36"]  # whose rows are wider than a program takes
        found = list(tune.measure_few_rows(models, [1, 4], torch.bfloat16, torch.device("cuda"), time))
    assert tried == [7, 5] * 5
    assert [entry.rows for entry in found] == [2, 8, 18, 32, 50]
    assert found[1] == FEW_ROWS._replace(milliseconds=2.0)
    assert found[4] == FEW_ROWS._replace(rows=50, fused=0, milliseconds=2.0)


@needs_virtual_gpu
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param((2, 4), True, id="the shape of an entry"),
        pytest.param((14, 1), True, id="less than twice as many rows"),
        pytest.param((2, 20), False, id="nearer to another entry"),
        pytest.param((2, 1), False, id="less than half: no entry"),
        pytest.param((2, 4, 1280), False, id="another width"),
    ],
)
def test_blocks_take_the_entry_with_the_nearest_rows(call: tuple, expected: bool, tmp_path: Path, monkeypatch):
    R, L, C = (*call, 1024)[:3]
    with virtual_gpu(90):
        x = torch.empty(R, L, C, dtype=torch.bfloat16, device="cuda")
        monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        assert not few_rows_pay(x, 4 * C)
        write_table(TABLE, tmp_path / "tuned.json")
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
        assert few_rows_pay(x, 4 * C) == expected
        with using_few_rows(not expected):
            assert few_rows_pay(x, 4 * C) != expected
            assert not few_rows_pay(x.repeat(64, 1, 1), 4 * C), "as many rows are never few"


def tiles_of(images: int, fused: bool, channels: int = 320) -> int | None:
    """Return the pixels of the tiles that the table has for a convolution; None where the library runs."""
    with virtual_gpu(90):
        x = torch.empty(images, 32, 32, channels, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
        found = tuned_conv3x3(x, 160, fused)
        return None if found is None else found.pixels


@needs_virtual_gpu
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param((8, False), 128, id="the shape of an entry"),
        pytest.param((5, False), 128, id="less than twice as many images"),
        pytest.param((40, False), 64, id="nearer to another entry"),
        pytest.param((1, False), None, id="less than half: the library"),
        pytest.param((8, True), None, id="the library was faster"),
        pytest.param((8, False, 640), None, id="another shape"),
    ],
)
def test_convolutions_take_the_nearest_entry(call: tuple, expected: int | None, tmp_path: Path, monkeypatch):
    write_table(TABLE, tmp_path / "tuned.json")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "tuned.json"))
    assert tiles_of(*call) == expected


@needs_virtual_gpu
def test_without_a_table_every_convolution_is_the_librarys(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert tiles_of(8, False) is None
    with torch.no_grad(), virtual_gpu(90) as gpu:
        x = torch.empty(8, 32, 32, 320, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
        conv3x3(x, torch.empty(160, 320, 3, 3, dtype=torch.bfloat16, device="cuda"), None)
        assert "_conv3x3" not in [launch.name for launch in gpu.launches]


@needs_virtual_gpu
def test_the_fastest_way_to_convolve_is_chosen(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    times, launched = iter([3.0, 2.0, 1.0, 1.0, 2.0, 3.0]), []
    with torch.no_grad(), virtual_gpu(90) as gpu:

        def time(run) -> float:
            gpu.launches.clear()
            run()
            launched.append([launch.name for launch in gpu.launches if "conv" in launch.name or "add" in launch.name])
            return next(times)

        todo = [tune.ImageMap(images=2, side=8, inputs=320, outputs=160)]
        found = list(tune.measure_convolutions(todo, torch.bfloat16, torch.device("cuda"), time))
    own = ["_conv3x3"]
    assert launched == [["aten.convolution"], own, own, ["aten.convolution", "_add_and_measure"], own, own]
    sizes = ("bfloat16", 8, 8, 320, 160)
    assert found == [ConvEntry(*sizes, 0, 2, 64, 1.0), ConvEntry(*sizes, 1, 2, 0, 1.0)]


@needs_virtual_gpu
def test_the_fastest_of_all_schedules_and_tiles_is_chosen(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    candidates = expert_ffn_candidates(90, torch.bfloat16, 256, aligned=True)
    times = iter([3.0, 2.0, 1.0, 5.0, 4.0, 6.0])
    tried = []

    with torch.no_grad(), virtual_gpu(90) as gpu:

        def time(run) -> float:
            gpu.launches.clear()
            run()
            down = gpu.launches[-1].kernel.constants
            tried.append((down["BLOCK_T"], down["BLOCK_C"], "_sort_rows" in {launch.name for launch in gpu.launches}))
            return next(times)

        found = list(tune.measure([(384, 1024)], torch.bfloat16, torch.device("cuda"), time))
    assert tried == [(t.rows, t.down.columns, s == "tile_list") for t in candidates for s in SCHEDULES]
    assert found == [Entry("bfloat16", 384, 1024, 256, "dense", candidates[1].rows, candidates[1].down.columns, 1.0)]


def test_shapes_are_those_of_the_last_two_scales_under_guidance():
    assert tune.shapes(["d20", "d16"], [1, 1]) == [(254, 1024), (384, 1024), (254, 1280), (384, 1280)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as raised:
        tune.main(["--out", str(tmp_path / "tuned.json")])
    assert raised.value.code == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch found none")
def test_on_a_gpu_a_table_is_measured_and_used(tmp_path: Path, monkeypatch):
    path = tmp_path / "tuned.json"
    assert tune.main(["--models", "d16", "--batches", "1", "--out", str(path)]) == 0
    table = read_table(path)
    assert [entry.tokens for entry in table.expert_ffn] == [254, 384]
    run = tune._call(384, 1024, torch.bfloat16, torch.device("cuda"))
    expected = run("dense")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(path))
    torch.testing.assert_close(run("auto"), expected)
