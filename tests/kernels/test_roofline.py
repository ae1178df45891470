"""The times that are predicted from what a virtual GPU records, and the benchmark that prints them."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch

pytest.importorskip("triton")

from support.helpers import make_tiny_var
from support.recorded_launches import cuda, launch_scale, recorded
from torch.utils.flop_counter import FlopCounterMode

from actvar import ActVARConfig
from actvar.flops import model_flops
from actvar.patching.patch import patch_silently
from actvar_kernels import BackendUnavailableError, linear
from actvar_kernels.backend import using_backend
from actvar_kernels.operations.shapes import Model
from actvar_kernels.tools.virtual import (
    CompiledKernel,
    HostSyncError,
    Launch,
    TensorInfo,
    to_fake_cuda,
    virtual_gpu,
    why_unavailable,
)
from actvar_kernels.tools.virtual.cost import COSTS, Cost
from actvar_kernels.tools.virtual.resources import resources
from benchmarks import roofline, routing
from benchmarks import virtual_gpu as benchmark

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)


def a_launch(name: str = "aten.add", **fields) -> Launch:
    return Launch(**{"name": name, "region": "", "bytes": 0, "flops": 0, "dtype": None} | fields)


LAUNCH = roofline.LAUNCH_SECONDS
CARD = roofline.Card(80, 100.0, 10.0, 1000.0, multiprocessors=10, gigahertz=1.0, cache_megabytes=1, cublas=0.5)


def full(_tokens: int, _rows: int) -> float:
    return 1.0


def test_memory_bound_time_is_bytes_by_bandwidth_and_the_cost_of_each_launch():
    launch = a_launch(bytes=800_000, launches=3)
    assert roofline.seconds(launch, CARD, full) == pytest.approx(3 * LAUNCH + 1e-6)


def test_time_of_a_cublas_product_counts_whole_tiles_in_whole_waves():
    # 128 x 1280: 10 tiles of 128 x 128 are one wave at half of 100 TFLOP/s; a row more makes it 20 tiles, two waves
    flops = 2 * 128 * 1280 * 1000
    even = a_launch(
        "aten.mm", flops=flops, dtype=torch.bfloat16, result=TensorInfo((128, 1280), (1280, 1), torch.bfloat16)
    )
    assert roofline.seconds(even, CARD, full) == pytest.approx(LAUNCH + flops / 50e12)
    flops = 2 * 129 * 1280 * 1000
    odd = a_launch(
        "aten.mm", flops=flops, dtype=torch.bfloat16, result=TensorInfo((129, 1280), (1280, 1), torch.bfloat16)
    )
    # 30 tiles of 64 x 128 at 0.85 of the rate come first: 3 waves of half the time each
    assert roofline.seconds(odd, CARD, full) == pytest.approx(LAUNCH + 3 / 2 / 0.85 * 2 * 128 * 1280 * 1000 / 50e12)


def test_time_of_a_triton_product_counts_its_programs(monkeypatch):
    cost = Cost(bytes=0, flops=10**9, dtype=torch.bfloat16, running=0.5, tile=(64, 64), instructions=1)
    monkeypatch.setitem(COSTS, "toy", lambda arguments, share: cost)
    kernel = CompiledKernel("toy", 80, 4, 3, 0, b"", None, "", {})
    launch = a_launch("toy", kernel=kernel, grid=(11, 2, 1), arguments={})
    # 11 of 22 programs run, on 10 multiprocessors; Triton at 0.88 of cuBLAS, tiles of 64 x 64 at 0.7
    assert roofline.seconds(launch, CARD, full) == pytest.approx(LAUNCH + 1e9 * 20 / 11 / (50e12 * 0.88 * 0.7))


def test_time_of_a_kernel_without_products_is_that_of_its_instructions():
    (launch,) = recorded(80, lambda gpu: launch_scale(cuda(256 * 30)))
    count = resources(launch.kernel).instructions.total()
    # 30 programs of 64 threads, 128 threads' instructions per cycle of 1 ns on each of 10 multiprocessors
    expected = 30 * 64 * count / (10 * 128 * 0.7) * 1e-9
    assert roofline.seconds(launch, CARD._replace(gigabytes_per_second=1e6), full) == pytest.approx(LAUNCH + expected)


def test_single_precision_does_not_run_at_the_speed_of_tensor_cores():
    launch = a_launch("aten.sum", flops=7 * 10**6, dtype=torch.float32)
    assert roofline.seconds(launch, CARD, full) == pytest.approx(LAUNCH + 1e-6)


def test_time_of_a_convolution_counts_whole_tiles_and_reads_from_the_cache():
    # 2 images of 16 x 40 are 1280 rows: 10 tiles of 128 x 128, one wave at half of 100 TFLOP/s
    flops = 2 * 1280 * 128 * 9 * 128
    launch = a_launch(
        "aten.convolution",
        flops=flops,
        dtype=torch.bfloat16,
        result=TensorInfo((2, 128, 16, 40), (1, 1, 1, 1), torch.bfloat16),
    )
    expected = LAUNCH + flops / (50e12 * roofline.CONVOLUTION)
    assert roofline.seconds(launch, CARD, full) == pytest.approx(expected)


def test_a_convolution_with_few_outputs_runs_without_tensor_cores():
    flops = 37 * 10**9
    result = TensorInfo((2, 8, 16, 40), (1, 1, 1, 1), torch.bfloat16)
    launch = a_launch("aten.convolution", flops=flops, dtype=torch.bfloat16, result=result)
    assert roofline.seconds(launch, CARD, full) == pytest.approx(LAUNCH + 10e-3)


def test_the_share_of_blocks_of_a_hand_made_routing():
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.bool)
    assert routing.share_of_blocks(mask, rows=2) == 0.5, "sorted by expert every tile needs one of two"
    assert routing.share_of_blocks(mask, rows=4) == 1.0
    assert routing.share_function(0.1)(100, 128) == pytest.approx(0.9)


def test_random_routing_leaves_out_more_with_more_tokens():
    share = routing.share_function("random")
    assert 0.75 < share(8192, 128) < share(1024, 128) <= 1


@pytest.mark.slow
def test_a_small_model_samples_on_the_virtual_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(benchmark.MODELS, "d16", Model(128, (1, 2, 3, 5)))
    file = tmp_path / "report.json"
    assert (
        benchmark.main(["--model", "d16", "--gpu", "a100", "--batch", "1", "--skip", "0.1", "--json", str(file)]) == 0
    )
    out = capsys.readouterr().out
    assert "every time is predicted, none is measured" in out
    report = json.loads(file.read_text())
    for name in ("dense", "actvar"):
        steps = report[name]["steps"]
        assert [step["tokens"] for step in steps] == [1, 4, 9, 25]
        assert max(step["launches_per_block"] for step in steps[-2:]) <= 8
        parts = sum(step["blocks_ms"] + step["rest_ms"] for step in steps)
        assert 0 < report[name]["last_two_steps_ms"] < parts < report[name]["whole_run_ms"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [benchmark.DENSE, benchmark.ACTVAR], ids=["dense", "ActVAR"])
def test_a_sample_in_fp8_has_the_launches_of_one_in_int8(monkeypatch, config):
    monkeypatch.setitem(benchmark.MODELS, "d16", Model(128, (1, 2, 3, 5)))
    runs = [benchmark.sampling_run("d16", 1, 90, config, weights=weights) for weights in ("int8", "fp8")]
    in_bytes, in_fp8 = ([launch for step in run.steps for launch in chain(*step.blocks)] for run in runs)
    assert [launch.name for launch in in_fp8] == [launch.name for launch in in_bytes]
    assert {launch.arguments["values_ptr"].dtype for launch in in_fp8 if launch.name == "_multiply_bytes"} == {
        torch.float8_e4m3fn
    }


@pytest.mark.parametrize(("arch", "named"), [(80, "cuda 80"), (86, "cuda 86"), ("gfx942", "hip gfx942")])
def test_fp8_is_refused_where_the_gpu_has_no_products_of_it(arch, named):
    with virtual_gpu(arch):
        tensors = cuda(3, 64), cuda(32, 64), cuda(32)
        with pytest.raises(BackendUnavailableError, match=f"8.9 or higher, got {named}; use int8"):
            linear(*tensors, torch.float8_e4m3fn)


@pytest.mark.slow
def test_torchs_counter_sees_the_operators_of_a_patched_model():
    var = make_tiny_var()
    steps = model_flops(var, 2, ActVARConfig())
    with torch.no_grad(), using_backend("triton"), virtual_gpu(80):
        for module in (var, var.vae_proxy[0]):
            to_fake_cuda(module)
        patch_silently(var, ActVARConfig())
        with FlopCounterMode(display=False) as counter:
            var.autoregressive_infer_cfg(2, torch.empty(2, dtype=torch.int64, device="cuda"))
    counted, ops = counter.get_flop_counts()["Global"], torch.ops.actvar_kernels
    assert counted[ops.select_tokens] == sum(step.selector for step in steps)
    assert counted[ops.add_normalize_route] == sum(step.router for step in steps)
    assert counted[ops.expert_ffn_scatter] == sum(step.ffn for step in steps[-2:])
    attention = counted[ops.subset_attention] + counted[ops.subset_attention_append]
    assert attention == sum(step.attention for step in steps)


def test_a_sampling_loop_that_waits_is_reported(monkeypatch, capsys):
    def waits(*_):
        raise HostSyncError("aten._local_scalar_dense.default makes the host wait for the GPU")

    monkeypatch.setattr(benchmark, "sampling_run", waits)
    assert benchmark.main(["--skip", "random"]) == 1
    assert "_local_scalar_dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpu", "v100"], "v100"),
        (["--model", "d17"], "d17"),
        (["--batch", "0"], "expected an integer above 0, got '0'"),
        (["--skip", "1.5"], "measured, random or a number in [0, 1), got '1.5'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error
