"""The benchmarks' own machinery: rows, refusals, components, memory, exponents, plots."""

from __future__ import annotations

import itertools
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from actvar.config import DENSE, ActVARConfig
from actvar.models import build_vae_var
from actvar.patching.patch import patched_silently
from actvar.sampling import timing
from actvar_kernels.conv3x3 import cpu_kernel
from actvar_kernels.cpu_backend import cpu
from benchmarks import components, convolutions, few_tokens, memory, plots, providers, results, sampling, scaling
from benchmarks.providers import Case, WrongNumbersError
from benchmarks.results import Shape

CASE = Case("fashion-mnist", 1, 0.75)
SHAPE = Shape("fashion-mnist", 4, "fp32", 0.75, 8)


# --- rows


def test_rows_survive_the_csv(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    rows = [SHAPE.row("dense", "whole sample", "ms", [3.0, 1.0, 2.0]), SHAPE.row("ActVAR", "qkv", "ms", [0.123456], 6)]
    results.add(path, rows)
    assert results.read(path) == rows
    assert path.read_text().splitlines()[0] == ",".join(results.COLUMNS)


def test_a_new_measurement_takes_the_place_of_the_old_one_and_of_no_other(tmp_path):
    path = tmp_path / "cpu.csv"
    old, other = SHAPE.row("dense", "qkv", "ms", [1.0]), replace(SHAPE, batch=8).row("dense", "qkv", "ms", [5.0])
    results.add(path, [old, other])
    new = SHAPE.row("dense", "qkv", "ms", [2.0])
    results.add(path, [new])
    assert results.read(path) == [new, other]


def test_a_file_with_other_columns_is_refused_and_stays(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("provider,ms\ndense,3\n")
    with pytest.raises(ValueError, match="expected the columns provider, operation"):
        results.add(path, [SHAPE.row("dense", "qkv", "ms", [1.0])])
    assert path.read_text() == "provider,ms\ndense,3\n"


def test_percentiles_are_those_of_linear_interpolation():
    values = [float(value) for value in random.Random(0).sample(range(1000), 17)]
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    assert results.percentiles_of(values) == pytest.approx(expected.tolist())
    assert results.percentiles_of([7.0]) == (7.0, 7.0, 7.0)


def gpu_report(passed: bool) -> dict:
    machine = {"gpu": "NVIDIA X", "torch": "2.13.0", "triton": "3.7.1", "commit": "abc", "time": "2030-01-01T00:00:00"}
    numerics = [{"operation": "scatter_rows", "passed": passed}]
    times = [
        {"model": "d16", "batch": 8, "operation": "scatter_rows", "triton_ms": [1, 2, 3], "reference_ms": [4, 5, 6]}
    ]
    eager = {"model": "d16", "batch": 8, "way": "dense", "sample_eager_ms": [10, 11, 12]}
    blocks = [{"1": 1.0, "2": 2.0, "3": last} for last in (3.0, 4.0, 5.0)]
    models = [eager | {"sample_graph_ms": [7, 8, 9], "blocks_graph_ms": blocks}]
    return {"machine": machine, "numerics": numerics, "graphs": [], "times": times, "models": models}


def test_what_make_gpu_writes_becomes_rows_with_its_percentiles_and_origin():
    rows = results.gpu_rows(gpu_report(passed=True))
    found = {(row.provider, row.operation): (row.p20, row.p50, row.p80) for row in rows}
    blocks = {name: found.pop(("dense, graph", name)) for name in ("blocks, last two", "all blocks", "blocks, 3x3")}
    assert {name: middle for name, (_, middle, _) in blocks.items()} == {
        "blocks, last two": 6,
        "all blocks": 7,
        "blocks, 3x3": 4,
    }
    assert found == {
        ("triton", "scatter_rows"): (1, 2, 3),
        ("reference", "scatter_rows"): (4, 5, 6),
        ("dense, graph", "whole sample"): (7, 8, 9),
        ("dense, eager", "whole sample"): (10, 11, 12),
        ("dense, graph", "blocks, 1x1"): (1, 1, 1),
        ("dense, graph", "blocks, 2x2"): (2, 2, 2),
    }
    assert {(row.commit, row.time, row.batch, row.side) for row in rows} == {("abc", "2030-01-01T00:00:00", 8, 16)}


def test_every_kernel_of_a_graph_has_a_row_of_its_time_and_of_its_launches():
    report = gpu_report(passed=True)
    report["models"][0]["kernels"] = {"sm90_gemm<128, 256>": [48, 12.5], "_attention": [16, 3.25]}
    found = {
        (row.operation, row.metric): row.p50
        for row in results.gpu_rows(report)
        if row.provider == "dense, graph" and row.operation.startswith("kernel ")
    }
    assert found == {
        ("kernel sm90_gemm<128, 256>", "ms"): 12.5,
        ("kernel sm90_gemm<128, 256>", "launches"): 48,
        ("kernel _attention", "ms"): 3.25,
        ("kernel _attention", "launches"): 16,
    }


def test_a_gpu_report_with_wrong_numerics_gives_no_rows():
    with pytest.raises(ValueError, match="got failures of scatter_rows; not reported"):
        results.gpu_rows(gpu_report(passed=False))


def test_an_evaluation_becomes_rows_of_time_and_fid_that_the_plot_of_quality_shows(tmp_path):
    method = {"seconds_of_batches": [0.01, 0.02, 0.03], "by_seed": [{"fid": 14.0}, {"fid": 15.0}, {"fid": 16.0}]}
    report = {
        "model": "fashion-mnist",
        "dtype": "fp32",
        "torch": "2.13.0",
        "settings": {"batch": 50},
        "methods": {"best": method, "skip@1": method | {"by_seed": []}},
    }
    rows = results.evaluation_rows(report)
    assert [(row.provider, row.metric, row.p50) for row in rows] == [
        ("best", "ms", 1000.0),
        ("best", "FID", 15.0),
        ("skip@1", "ms", 1000.0),
    ]
    assert {(row.batch, row.side, row.torch) for row in rows} == {(50, 8, "2.13.0")}
    (points,) = plots.quality(rows).axes
    assert [(line.get_label(), *line.get_xydata()[0]) for line in points.lines] == [("best, fashion-mnist", 20.0, 15.0)]


# --- operations


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_every_provider_computes_what_the_reference_does(rate, dtype):
    found = providers.providers(Case("fashion-mnist", 2, rate, dtype), "cpu")
    assert {"reference", "cpu", "torch grouped_mm"} <= found["expert_ffn_scatter dense"].keys()
    packs = dtype == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ("torch packed" in found["expert_ffn_scatter dense"]) == packs
    assert ("dense_ffn" in found) == (rate == 1)


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_convolution_is_that_in_float64(dtype, monkeypatch):
    monkeypatch.setitem(convolutions.LAYERS, "small", ((32, 8),))
    if dtype == torch.bfloat16 and not cpu.multiplies_bfloat16():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    found = convolutions.convolution_providers("small", 2, dtype)
    assert list(found) == ["conv3x3 32x8x8", "conv3x3 enlarged 32x8x8"]
    for ways in found.values():
        assert {run().shape for run in ways.values()} == {(2, 32, 8, 8)}
    kernel = cpu_kernel.conv3x3
    monkeypatch.setattr(cpu_kernel, "conv3x3", lambda *args, **options: kernel(*args, **options) * 1.1)
    with pytest.raises(WrongNumbersError, match=r"conv3x3 32x8x8: cpu errs by .*; not timed"):
        convolutions.convolution_providers("small", 2, dtype)


def test_an_operation_with_wrong_numbers_is_not_timed(monkeypatch):
    native = providers._native_gates

    def slightly_wrong(inputs):
        ways = native(inputs)
        attend = ways["subset_attention"]["torch"]
        ways["subset_attention"]["torch"] = lambda: attend() * 1.0001
        return ways

    monkeypatch.setattr(providers, "_native_gates", slightly_wrong)
    with pytest.raises(WrongNumbersError, match=r"subset_attention: torch errs by .*; not timed"):
        providers.measure(CASE, "cpu")


def test_numbers_that_are_not_numbers_are_wrong(monkeypatch):
    monkeypatch.setattr(providers, "_plain_ffn", lambda u, inputs: u * torch.nan)
    with pytest.raises(WrongNumbersError, match="dense_ffn: torch errs by nan"):
        providers.measure(replace(CASE, rate=1.0), "cpu")


class Clock:
    """In place of the module `time`: it stands still but for `sleep`, and `tick` seconds with every look at it."""

    def __init__(self, tick: float = 0.0):
        self.now, self.tick, self.looks = 0.0, tick, 0

    def perf_counter(self) -> float:
        self.now, self.looks = self.now + self.tick, self.looks + 1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_calls_are_timed_in_turn(monkeypatch):
    order, clock = [], Clock()
    monkeypatch.setattr(timing, "time", clock)

    def slept(name: str, seconds: float) -> None:
        order.append(name)
        clock.sleep(seconds)

    ways = {"a": lambda: slept("a", 0.25), "b": lambda: slept("b", 0.5)}
    seconds = providers.interleaved(ways, budget=0.0)
    assert seconds == {"a": [0.25] * providers.REPEATS[0], "b": [0.5] * providers.REPEATS[0]}
    assert order[-2 * providers.REPEATS[0] :] == ["a", "b"] * providers.REPEATS[0]


# --- components and memory


@pytest.mark.parametrize("config", [None, DENSE, ActVARConfig()], ids=["dense", "accelerated", "ActVAR"])
def test_components_add_up_to_the_sample_and_name_what_ran(tiny_var, config, monkeypatch):
    def sample() -> None:
        tiny_var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=0, top_k=20, top_p=0.95)

    clock = Clock(tick=1.0)
    monkeypatch.setattr(components, "time", clock)
    with nullcontext() if config is None else patched_silently(tiny_var, config, None):
        steps = components.components(tiny_var, sample)
    assert len(steps) == len(tiny_var.patch_nums)
    assert sum(sum(step.values()) for step in steps) == clock.looks - 2  # the second look is the start
    always = ("qkv", "attention", "proj", "ffn", "norms", "head", "sampling")
    assert all(step[name] > 0 for step in steps for name in always)
    assert [step["select"] > 0 for step in steps] == [config == ActVARConfig() and number >= 2 for number in range(4)]
    assert [step["decoder"] > 0 for step in steps] == [False, False, False, True]


def test_nothing_stays_wrapped(tiny_var):
    linear, decode = torch.nn.functional.linear, tiny_var.vae_proxy[0].fhat_to_img
    components.components(tiny_var, lambda: tiny_var.autoregressive_infer_cfg(1, 3, g_seed=0))
    assert torch.nn.functional.linear is linear
    assert tiny_var.vae_proxy[0].fhat_to_img == decode
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_var.modules())


def test_a_nested_component_does_not_count_in_the_outer_one(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(components, "time", clock)
    watch = components.Stopwatch()
    inner = watch.wrapped(lambda: clock.sleep(3.0), "attention")
    watch.wrapped(lambda: (clock.sleep(1.0), inner(), clock.sleep(0.5)), "norms")()
    assert watch.steps[0] == {"other": 0.0, "norms": 1.5, "attention": 3.0}


def test_live_bytes_are_those_of_tensors_alive_at_once():
    def run() -> torch.Tensor:
        x = torch.empty(1000, device="meta")  # 4000 bytes
        for _ in range(5):
            x = x + 1  # two alive
        x.add_(1)
        return x.view(10, 100)

    assert memory.peak_live_bytes(run) == 8000


def test_the_bound_holds_weights_cache_and_the_larger_activations():
    vae, var = build_vae_var(V=64, Cvae=8, ch=32, patch_nums=(1, 2, 4), depth=3, width=128, device="meta")
    plain = memory.bound(vae, var, 5, DENSE, kernels=False)
    assert plain.weights == 4 * (sum(p.numel() for p in var.parameters()) + sum(p.numel() for p in vae.parameters()))
    assert plain.cache == 3 * 2 * 10 * 5 * 128 * 4  # blocks, keys and values, rows, tokens before the last scale
    assert plain.block >= 10 * 16 * 4 * 128 * 4  # the FFN's hidden units
    longer = memory._block_bytes(var, 2, 4096) / memory._block_bytes(var, 2, 256)
    assert longer == pytest.approx(16, rel=0.01)  # no matrix of attention scores
    assert plain.decoder > plain.block
    assert plain.total == plain.weights + plain.cache + plain.decoder
    packed = memory.bound(vae, var, 5, DENSE, kernels=True)
    transformed = 0
    for name, module in (("post_quant_conv", vae.post_quant_conv), *vae.decoder.named_modules()):
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels % 16 == 0:
            level = int(name.split(".")[1]) if name.startswith("up.") else 0 if name == "conv_out" else 4
            side = 4 * 2 ** (4 - level)
            D, C = module.weight.shape[:2]
            transformed += (25 if "upsample" in name else 36 if side**2 >= 4 * max(C, D) else 16) * D * C
    # a second copy of blocks and head, and the decoder's convolutions
    assert packed.total - plain.total == 4 * (3 * 12 * 128**2 + 64 * 128 + transformed)
    in_bytes = memory.bound(vae, var, 5, DENSE, kernels=True, int8=True)
    assert packed.packed - in_bytes.packed == 3 * 3 * 12 * 128**2  # three of four bytes of the blocks' numbers
    sparse = memory.bound(vae, var, 5, ActVARConfig(scales=(-2, -1), token_rates=(0.5, 0.5)), kernels=False)
    assert sparse.cache == 3 * 2 * 10 * 3 * 128 * 4


@pytest.mark.parametrize("command", [sampling.main, scaling.main])
def test_no_row_calls_the_reference_accelerated(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sampling.cpu, "why_unavailable", lambda: "no compiler")
    with pytest.raises(SystemExit):
        command(["--csv", str(tmp_path / "cpu.csv")])
    assert "rows are of the C++ kernels, which do not run here: no compiler" in capsys.readouterr().err
    assert not (tmp_path / "cpu.csv").exists()


@pytest.mark.skipif(few_tokens.cpu.why_unavailable() is not None, reason="it times the C++ kernel")
def test_few_tokens_times_all_experts_beside_those_that_were_chosen(capsys, monkeypatch):
    seconds = itertools.cycle([3.0, 2.0])  # of all experts, of those that were chosen
    monkeypatch.setattr(few_tokens, "seconds_of", lambda run, device: (run(), next(seconds))[1])
    few_tokens.main(["--models", "fashion-mnist", "--tokens", "1", "9", "--repeats", "2"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("| 1 | 9 |")
    assert rows[0].startswith("| fashion-mnist, fp32 | ")
    assert all(row.endswith(" | 1.50 | 1.50 |") for row in rows)
    monkeypatch.setattr(few_tokens.cpu, "why_unavailable", lambda: "no compiler")
    with pytest.raises(SystemExit):
        few_tokens.main([])
    assert "no compiler" in capsys.readouterr().err


# --- scaling


@pytest.mark.parametrize("power", [0.5, 1.0, 2.7])
def test_the_exponent_of_a_power_law(power):
    x = [1, 2, 4, 8, 16]
    assert scaling.exponent(x, [3 * value**power for value in x]) == pytest.approx(power)
    noise = random.Random(0)
    noisy = [3 * value**power * noise.uniform(0.95, 1.05) for value in x]
    assert scaling.exponent(x, noisy) == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(("x", "y"), [([2, 2], [1, 3]), ([1, 2], [0, 1]), ([-1, 2], [1, 1])])
def test_no_exponent_where_there_is_none(x, y):
    with pytest.raises(ValueError, match="expected positive numbers at two or more different x"):
        scaling.exponent(x, y)


def test_a_point_of_one_block_is_scaled_to_the_depth():
    point = scaling.Point("depth", 16, "d16", 1, pixels=256)
    small = replace(point, model="fashion-mnist", pixels=None)
    assert not point.whole
    assert small.whole
    figures = scaling.measured(small, 1)
    assert figures["dense"]["transformer", "GFLOP"][0] > figures["ActVAR"]["transformer", "GFLOP"][0]
    assert all(values[0] > 0 for of_way in figures.values() for values in of_way.values())


def test_predicted_cost():
    """8 images in 100 ms are 288,000 an hour; at 2.88 dollars an hour a million costs 10."""
    cost = scaling.predicted_cost(100.0, 8, 2.88)
    assert cost == pytest.approx({"predicted_images_per_gpu_hour": 288_000, "predicted_dollars_per_million": 10})


# --- plots


def made_up_rows(with_quality: bool) -> list[results.Result]:
    rows = []
    for batch, ms in ((1, 10.0), (4, 20.0), (16, 60.0)):
        shape = replace(SHAPE, batch=batch)
        rows += [shape.row("dense", "whole sample", "ms", [ms, ms + 1, ms + 2])]
        rows += [shape.row("ActVAR", "whole sample", "ms", [ms / 2])]
    for step in (1, 2, 3):
        rows += [SHAPE.row(way, name, "ms", [step], step) for way in ("dense", "ActVAR") for name in ("qkv", "ffn")]
    for rate in (0.5, 1.0):
        shape = replace(SHAPE, rate=rate)
        rows += [shape.row("cpu", "expert_ffn_scatter dense", "ms", [4 * rate])]
        for operation in ("all blocks", "blocks, last two"):
            for way, ms in (("accelerated", 8.0), ("ActVAR", 8 * rate)):
                for metric in ("ms", "GFLOP"):
                    rows.append(shape.row(way, f"scaling rate: {operation}", metric, [ms]))
    rows.append(replace(SHAPE, rate=1.0).row("cpu", "dense_ffn", "ms", [4.0]))
    if with_quality:
        for way, fid in (("dense", 3.0), ("ActVAR", 4.0)):
            rows += [SHAPE.row(way, "evaluated sample", *of) for of in (("FID", [fid]), ("ms", [9.0]))]
    return rows


@pytest.mark.parametrize("with_quality", [False, True])
def test_plots_are_drawn_from_a_csv(tmp_path, with_quality):
    results.add(tmp_path / "results" / "some-cpu.csv", made_up_rows(with_quality))
    assert plots.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "images")]) == 0
    expected = ["speedup", "steps", "throughput"] + ["quality"] * with_quality
    written = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert written == sorted(f"bench-some-cpu-{name}.png" for name in expected)
    assert all((tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG") for name in written)


def test_the_drawn_points_are_the_rows():
    figure = plots.throughput(made_up_rows(False))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(lines["dense"].get_xdata()) == [1, 4, 16]
    assert list(lines["dense"].get_ydata()) == pytest.approx([1e3 / 11, 4e3 / 21, 16e3 / 61])
    panels = plots.speedup(made_up_rows(False)).axes
    assert len(panels) == 3
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[2].get_lines()}
    assert lines["cpu"] == pytest.approx([2, 1])  # at rates of 0.5 and 1
    assert lines["ceiling by FLOPs"] == pytest.approx([4, 1])


def test_without_a_csv_the_command_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        plots.main(["--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert "make bench writes one" in capsys.readouterr().err
