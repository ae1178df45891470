"""`make gpu` without a GPU: what it would measure, in which order, and what it leaves out when the time is over."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks import gpu, results
from benchmarks.gpu_convolutions import Layer, decoder_layers, four_pixels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "expected a CUDA device, found none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_after_every_row(tmp_path, monkeypatch):
    path, seen = tmp_path / "gpu.json", []

    def rows():
        for number in range(3):
            if path.exists():
                seen.append(len(json.loads(path.read_text())["first"]))
            yield {"row": number}

    report = {"first": [], "second": []}
    gpu.measure({"first": rows, "second": lambda: [{"row": 9}]}, report, path, seconds=60)
    assert seen == [1, 2]
    assert json.loads(path.read_text()) == {"first": [{"row": 0}, {"row": 1}, {"row": 2}], "second": [{"row": 9}]}


def test_what_does_not_begin_in_time_is_left_out_from_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def rows():
        for number in range(5):
            now[0] += 3
            yield {"row": number}

    report = {"first": [], "second": []}
    gpu.measure({"first": rows, "second": rows}, report, tmp_path / "gpu.json", seconds=20)
    assert [len(report[name]) for name in ("first", "second")] == [5, 2]
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == "from second on, after 2 rows of it"


def test_the_layers_are_those_of_the_official_decoder():
    layers = decoder_layers()
    assert layers[Layer(160, 160, 256, 3)] == 6
    assert layers[Layer(160, 160, 256, 3, enlarges=True)] == 1
    assert layers[Layer(640, 1920, 16, 1)] == 4
    assert sum(layers.values()) == 51
    assert sum(count for layer, count in layers.items() if layer.enlarges) == 4
    gigaflops = sum(layer.flops * count for layer, count in layers.items()) / 1e9
    assert gigaflops == pytest.approx(393.0, abs=0.1), "without attention's products, 0.7"


def test_four_pixels_of_an_enlarged_map_are_one_convolution_by_two_times_two():
    x, weight = torch.randn(2, 6, 5, 7).double(), torch.randn(4, 6, 3, 3).double()
    found = F.conv2d(x, four_pixels(weight), padding=1).unflatten(1, (2, 2, 4))
    exact = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    for a in (0, 1):
        for b in (0, 1):
            shifted = found[:, a, b, :, a : a + 5, b : b + 7]
            torch.testing.assert_close(shifted, exact[:, :, a::2, b::2], rtol=0, atol=1e-5)


def test_early_launches_and_tiles_of_attention_become_rows():
    machine, of = dict.fromkeys(("torch", "triton", "commit", "time"), "x"), {"model": "d16", "batch": 8}
    report = {"machine": machine, **{name: [] for name in gpu.SECTIONS}}
    report["launches"] = [of | {"late_ms": [2, 3, 4], "early_ms": [1, 2, 3], "passed": True}, {"skipped": "sm_80"}]
    report["attention"] = [of | {"queries": 128, "keys": 64, "triton_ms": [5, 6, 7]}]
    found = {(row.provider, row.operation): row.p50 for row in results.gpu_rows(report)}
    assert found["triton, launched late", "a block of the last scale"] == 3
    assert found["triton, launched early", "a block of the last scale"] == 2
    assert found["triton, 128 x 64", "subset_attention"] == 6
    report["few_rows"] = [of | {"side": 2, "7_ms": [3, 4, 5], "5 early_ms": [2, 3, 4], "passed": True}]
    found = {(row.provider, row.side): row.p50 for row in results.gpu_rows(report) if row.operation == "a dense block"}
    assert found == {("triton, 7 launches", 2): 4, ("triton, 5 launches, early", 2): 3}
    report["launches"][0]["passed"] = False
    with pytest.raises(ValueError, match="got failures of a block"):
        results.gpu_rows(report)
