"""Linear layers of few rows without Triton's interpreter: on the CPU, launches and bytes on a virtual GPU, tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import make_tiny_var, sample
from torch.nn import functional as F

from actvar import accelerate
from actvar.sparse import layer_calls
from actvar_kernels import BackendUnavailableError, Gated, linear_residual, norm_linear, normalize_modulate
from actvar_kernels.backend import using_backend

pytest.importorskip("triton")

from support.recorded_launches import cuda, recorded

from actvar.config import DENSE
from actvar_kernels.linear.tiles import linear_residual_tiles, norm_linear_tiles
from actvar_kernels.operations.inputs import random_inputs
from actvar_kernels.operations.shapes import BlockShape, dense_scales
from actvar_kernels.tools import compile_check
from actvar_kernels.tools.block_step import dense_block_step
from actvar_kernels.tools.virtual import why_unavailable
from actvar_kernels.tools.virtual.resources import resources
from actvar_kernels.triton_backend.early_launch import using_early_launch
from actvar_kernels.triton_backend.few_rows import using_few_rows
from actvar_kernels.triton_backend.tiles import RDNA
from benchmarks.virtual_gpu import sampling_run

needs_virtual_gpu = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def test_on_the_cpu_they_are_the_reference_and_c_plus_plus_refuses() -> None:
    x, (scale, shift, gamma) = torch.randn(2, 3, 64), torch.randn(3, 2, 1, 64)
    weight, bias = torch.randn(64, 64), torch.randn(64)
    u = normalize_modulate(x, scale, shift)
    with using_backend("reference"):
        product = F.linear(normalize_modulate(x, scale, shift), weight, bias)
    torch.testing.assert_close(norm_linear(x, scale, shift, weight, bias), product)
    assert torch.equal(linear_residual(u, weight, bias, Gated(x, gamma)), x + gamma * F.linear(u, weight, bias))
    with using_backend("cpu"), pytest.raises(BackendUnavailableError, match="norm_linear: the 'cpu' backend"):
        norm_linear(x, scale, shift, weight, bias)


def test_gradients_are_those_of_pytorch() -> None:
    x, weight = torch.randn(2, 3, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    vectors, bias = torch.randn(3, 2, 1, 16), torch.randn(16)
    hidden = norm_linear(x, vectors[0], vectors[1], weight, bias, with_gelu=True)
    found = torch.autograd.grad(linear_residual(hidden, weight, bias, Gated(x, vectors[2])).sum(), (x, weight))
    u = F.layer_norm(x, (16,), eps=1e-6) * (1 + vectors[0]) + vectors[1]
    plain = x + vectors[2] * F.linear(F.gelu(F.linear(u, weight, bias), approximate="tanh"), weight, bias)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), (x, weight)))


def test_on_the_cpu_no_block_asks_for_them(monkeypatch) -> None:
    var = accelerate(make_tiny_var(depth=1))
    expected = sample(var)
    monkeypatch.setattr(layer_calls, "few_rows_pay", lambda *_, **__: pytest.fail("a block on the CPU asked"))
    with using_few_rows(True):
        assert torch.equal(sample(var), expected)


@pytest.mark.parametrize("cached", [0, 5])
def test_the_block_that_is_timed_in_5_and_in_7_launches_is_the_same(cached: int) -> None:
    inputs = random_inputs(BlockShape(2, 4, 4, cached, 128), torch.float64, "cpu")
    gamma1, gamma2, *others = inputs.modulation
    inputs = replace(inputs, update=torch.zeros_like(inputs.update))  # so that the input is x whatever its gate
    without_ffn = replace(inputs, modulation=(gamma1, torch.zeros_like(gamma2), *others))
    with using_backend("reference"):
        added = dense_block_step(inputs, few=True)() - dense_block_step(without_ffn, few=True)()
        torch.testing.assert_close(added, gamma2 * dense_block_step(inputs, few=False)())


def test_few_rows_are_those_of_the_first_scales() -> None:
    found = [(shape.rows, shape.tokens, shape.keep, shape.cached) for shape in dense_scales("d16", 1, 64)]
    assert found == [(2, 1, 1, 0), (2, 4, 4, 1), (2, 9, 9, 5), (2, 16, 16, 14), (2, 25, 25, 30)]
    assert dense_scales("d16", 64, 64) == []


@needs_virtual_gpu
def test_each_is_one_launch_that_reads_and_writes_every_tensor_once() -> None:
    R, L, C, D = 2, 9, 256, 1024

    def run(gpu):
        x, gate, hidden = cuda(R, L, C), cuda(R, 1, C), cuda(R, L, D)
        with using_backend("triton"):
            norm_linear(x, gate, gate, cuda(D, C), cuda(D), with_gelu=True)
            linear_residual(hidden, cuda(C, D), cuda(C), Gated(x, gate))

    norm, residual = recorded(90, run)
    assert (norm.name, residual.name) == ("_norm_linear", "_linear_residual")
    assert norm.bytes == 4 * (R * L * C + 2 * R * C + D * C + D + R * L * D)
    assert residual.bytes == 4 * (R * L * D + C * D + C + R * C + 2 * R * L * C)
    assert residual.flops == 2 * 32 * C * D, "two tiles of 16 rows"


@needs_virtual_gpu
def test_a_dense_block_takes_5_launches_where_rows_are_few() -> None:
    with using_few_rows(True), using_early_launch(True):
        run = sampling_run("d16", 1, 90, DENSE)
    counts = [[sum(launch.launches for launch in block) for block in step.blocks] for step in run.steps]
    (first, *others), dense = counts[0], 15 * [7] + [8]
    assert first == 7, "AdaLN of all blocks is two of them"
    assert others == 15 * [5]
    assert counts[1:5] == 4 * [16 * [5]]
    assert counts[5:] == 5 * [dense]
    assert sum(map(sum, counts)) == 967, "without few rows 1,132"
    names = ["_norm_linear", "_attention", "_linear_residual", "_norm_linear", "_linear_residual"]
    assert [launch.name for launch in run.steps[1].blocks[3]] == names
    launches = [launch for step in run.steps[:5] for launch in step.blocks[3]]
    assert all(launch.kernel.early for launch in launches)
    for launch in launches:
        before = resources(launch.kernel).before_wait
        assert before is not None
        fetches = launch.name != "_attention"
        assert (before["CCTL.E.PF2"] > 0) == fetches, "weights are asked for before the wait, and read behind it"
        assert [*compile_check.faults(launch.kernel)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120, RDNA])
@pytest.mark.parametrize("amd", [False, True])
def test_tiles_divide_what_they_cover(arch: int, amd: bool, dtype: torch.dtype) -> None:
    for channels in (64, 1024, 1920):
        for rows in (1, 2, 17, 64):
            norm = norm_linear_tiles(arch, amd, dtype, rows, channels, 4 * channels, 132)
            assert norm.columns % norm.step == 0
            assert norm.parts % norm.warps == 0
            tile = linear_residual_tiles(arch, dtype, rows, channels, 132)
            assert tile.rows <= max(32, rows)
            assert tile.step % tile.parts == 0


@pytest.mark.parametrize(("rows", "outputs", "columns"), [(2, 3072, 32), (2, 4096, 64), (50, 3072, 64), (2, 7680, 64)])
def test_wide_tiles_are_taken_where_enough_multiprocessors_have_one(rows: int, outputs: int, columns: int) -> None:
    assert norm_linear_tiles(90, False, torch.bfloat16, rows, 1024, outputs, 132).columns == columns


@pytest.mark.parametrize(("rows", "outputs", "tile"), [(2, 1024, (16, 16)), (50, 1024, (32, 32)), (2, 1920, (16, 32))])
def test_tiles_of_a_residual_are_smaller_for_fewer_outputs(rows: int, outputs: int, tile: tuple[int, int]) -> None:
    found = linear_residual_tiles(90, torch.bfloat16, rows, outputs, 132)
    assert (found.rows, found.columns) == tile
