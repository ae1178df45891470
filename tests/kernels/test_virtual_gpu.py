"""The virtual GPU: what is recorded, what is refused, what is left behind."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from support.recorded_launches import cuda, launch_scale, recorded
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from actvar.models.basic_vae import AttnBlock, ResnetBlock
from actvar.models.vqvae import VQVAE
from actvar_kernels import add_codes, add_normalize_route, expert_ffn_scatter, linears, select_tokens
from actvar_kernels.backend import using_backend
from actvar_kernels.tools.virtual import (
    HostSyncError,
    VirtualGPUUnavailableError,
    to_fake_cuda,
    virtual_gpu,
    why_unavailable,
)
from actvar_kernels.tools.virtual.resources import resources
from actvar_kernels.triton_backend.tiles import RDNA, architecture, most_registers, multiprocessors

if why_unavailable() is not None:
    pytest.skip(why_unavailable(), allow_module_level=True)


@triton.jit
def product_kernel(a_desc, b_desc, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BLOCK):
        acc = tl.dot(a_desc.load([0, k]), b_desc.load([0, k]).T, acc)
    tl.store(c_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], acc)


def test_experts_in_a_tile_list_are_three_launches_without_copies():
    def run(gpu):
        rows, weights = cuda(2, 5, 64), (cuda(256, 64), cuda(256), cuda(64, 256), cuda(64))
        mask = torch.empty(2, 5, 16, dtype=torch.bool, device="cuda")
        with using_backend("triton"):
            expert_ffn_scatter(None, None, rows, rows, mask, 12, *weights, cuda(2, 1, 64), "tile_list")

    names = [launch.name for launch in recorded(90, run) if launch.launches]
    assert names == ["_sort_rows", "_up", "_down"]


def test_several_layers_of_one_input_are_one_launch_that_copies_no_weight():
    layers, R, C, D = 3, 2, 64, 128

    def run(gpu):
        weights, biases = [cuda(D, C) for _ in range(layers)], [cuda(D) for _ in range(layers)]
        with using_backend("triton"):
            assert linears(cuda(R, C), weights, biases).shape == (layers, R, D)

    (launch,) = recorded(90, run)
    assert launch.name == "_linears"
    assert launch.bytes == 4 * (layers * (D * C + D + R * D) + R * C)


def test_the_codes_of_a_scale_are_added_in_two_launches_and_averaged_in_one():
    B, C, side, places, following = 2, 32, 16, 9, 4

    def run(gpu):
        tokens = cuda(B, places, dtype=torch.int64)
        with using_backend("triton"):
            add_codes(cuda(B, C, side, side), tokens, cuda(4096, C), cuda(C, C, 3, 3), cuda(C), 0.5, following)

    launches = recorded(90, run)
    assert [launch.name for launch in launches] == ["_enlarge", "_convolve_and_add", "_average"]
    features = 4 * B * C * side * side
    assert [launch.bytes for launch in launches] == [
        features + B * places * (8 + 4 * C),
        3 * features + 4 * (9 * C * C + C),
        features + 4 * B * C * following**2,
    ]


@pytest.mark.parametrize("R", [2, 128])
def test_tokens_are_scored_once_and_only_those_that_are_kept_are_read_again(R: int):
    L, C, keep = 16, 64, 12

    def launches(in_place: bool) -> list:
        def run(gpu):
            gate = cuda(R, 1, C)
            with using_backend("triton"):
                select_tokens(cuda(R, L, C), cuda(1, C), cuda(1), gate, gate, keep, in_place=in_place)

        return [launch for launch in recorded(90, run) if launch.launches]

    score, select = launches(in_place=True)
    assert (score.name, select.name) == ("_score", "_select")
    assert math.prod(score.grid) * score.kernel.constants["ROWS"] >= R * L, "every token has one program"
    row, scored = C * 4, 3 * R * L * 4  # scores and moments
    assert score.bytes == R * L * row + (C + 1) * 4 + scored
    kept = R * keep * (row + row + 8)  # x, modulated rows and index
    assert select.bytes == kept + 2 * R * row + scored  # scale, shift
    _, copying = launches(in_place=False)
    assert copying.bytes - select.bytes == R * (L - keep) * 2 * row, "rows that are not kept are read and written"


def test_a_deferred_sum_is_read_at_the_end_of_the_block_instead_of_written_in_the_middle():
    R, L, K, C = 2, 16, 12, 64

    def moved(deferred: bool) -> dict[str, int]:
        def run(gpu):
            x, update, gate = cuda(R, L, C), cuda(R, K, C), cuda(R, 1, C)
            index = torch.empty(R, K, dtype=torch.int64, device="cuda")
            ffn = cuda(256, C), cuda(256), cuda(C, 256), cuda(C)
            with using_backend("triton"):
                rows, u, mask, _ = add_normalize_route(
                    x, index, update, gate, gate, gate, cuda(16, C), cuda(16), 12, deferred=deferred
                )
                expert_ffn_scatter(x, index, rows, u, mask, 12, *ffn, gate, "tile_list")

        return {launch.name: launch.bytes for launch in recorded(90, run)}

    stored, deferred = moved(False), moved(True)
    rows = R * K * C * 4
    assert deferred["_add_normalize_route"] == stored["_add_normalize_route"] - rows
    assert deferred["_down"] == stored["_down"] + rows + R * C * 4  # the update and its gate


def test_a_triton_launch_is_compiled_and_recorded_with_its_arguments():
    (launch,) = recorded(90, lambda gpu: launch_scale(cuda(1000)))
    assert (launch.name, launch.grid, launch.launches) == ("scale_kernel", (4, 1, 1), 1)
    assert launch.bytes == 2 * 1000 * 4
    x = launch.arguments["x_ptr"]
    assert (x.shape, x.dtype, launch.arguments["count"]) == ((1000,), torch.float32, 1000)
    kernel = launch.kernel
    assert (kernel.arch, kernel.num_warps, kernel.constants) == (90, 2, {"BLOCK": 256})
    found = resources(kernel)
    assert 0 < found.registers <= 255
    assert found.stack == found.local == 0
    assert found.instructions["LDG"] > 0
    assert found.loops == ()


def test_tensor_descriptors_and_loops_are_understood():
    def run(gpu):
        a, b = cuda(64, 256, dtype=torch.bfloat16), cuda(64, 256, dtype=torch.bfloat16)
        blocks = (TensorDescriptor.from_tensor(matrix, [64, 64]) for matrix in (a, b))
        product_kernel[(1,)](*blocks, cuda(64, 64), 256, M=64, N=64, BLOCK=64, num_stages=3)

    (launch,) = recorded(90, run)
    assert launch.arguments["a_desc"].shape == (64, 256)
    assert launch.bytes == 2 * 64 * 256 * 2 + 64 * 64 * 4
    (loop,) = resources(launch.kernel).loops
    assert loop["HGMMA"] > 0
    assert loop["UTMALDG"] > 0


def test_a_view_has_the_alignment_of_its_offset():
    def run(gpu):
        x = cuda(1009)
        launch_scale(x[:1008])
        launch_scale(x[1:])

    aligned, shifted = recorded(80, run)
    assert aligned.kernel.binary != shifted.kernel.binary, "loads of 16 bytes are only possible where pointers allow it"


@pytest.mark.parametrize(("arch", "tuned_for", "count"), [(86, 86, 82), ("gfx942", 80, 304), ("gfx1100", RDNA, 96)])
def test_multiprocessors_and_tiles_are_those_of_the_gpu(arch, tuned_for, count):
    with virtual_gpu(arch):
        x = cuda(1)
        assert (architecture(x), multiprocessors(x)) == (tuned_for, count)
    assert (architecture(torch.empty(1)), multiprocessors(torch.empty(1))) == (80, 108)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_a_kernel_for_amd_is_compiled_and_its_assembly_read(arch):
    (launch,) = recorded(arch, lambda gpu: launch_scale(cuda(1000)))
    assert launch.kernel.arch == arch
    found = resources(launch.kernel)
    assert 0 < found.registers <= 256
    assert found.stack == found.local == 0
    assert any(name.endswith(("load_b128", "load_dwordx4", "load_dword", "load_b32")) for name in found.instructions)


def test_a_bound_of_registers_is_asked_for_only_where_there_is_one():
    assert most_registers(None) == {}
    assert most_registers(255) == {"maxnreg": 255}


def test_architectures_are_compiled_apart_in_one_process():
    assert [recorded(arch, lambda gpu: launch_scale(cuda(64)))[0].kernel.arch for arch in (80, 120, 80)] == [
        80,
        120,
        80,
    ]


def test_kernels_that_a_gpu_could_not_hold_are_not_launched():
    def run(gpu):
        a, b = cuda(128, 1024, dtype=torch.bfloat16), cuda(128, 1024, dtype=torch.bfloat16)
        blocks = (TensorDescriptor.from_tensor(matrix, [128, 128]) for matrix in (a, b))
        product_kernel[(1,)](*blocks, cuda(128, 128), 1024, M=128, N=128, BLOCK=128, num_stages=5)

    with pytest.raises(OutOfResources, match=r"shared memory \(product_kernel\)"):
        recorded(90, run)


def test_torch_operations_are_counted_and_views_are_not():
    def run(gpu):
        x, weight, bias = cuda(8, 16), cuda(32, 16), cuda(32)
        y = torch.nn.functional.linear(x, weight, bias).view(2, 4, 32).transpose(0, 1)
        y.detach()[1:].add_(1)
        torch.zeros(4, device="cuda")

    product, add, zeros = recorded(90, run)
    assert (product.name, product.flops, product.dtype) == ("aten.addmm", 2 * 8 * 16 * 32, torch.float32)
    assert product.bytes == 4 * (8 * 16 + 32 * 16 + 32 + 8 * 32)
    assert (add.name, add.bytes, add.flops) == ("aten.add_", 2 * 4 * 3 * 2 * 32, 0)
    assert (zeros.name, zeros.bytes) == ("aten.zeros", 16)


def test_convolutions_keep_the_layout_that_cudnn_would_and_add_a_bias_in_a_launch_of_its_own():
    outputs = []

    def run(gpu):
        x, weight = cuda(2, 8, 4, 4), cuda(16, 8, 3, 3)
        outputs.append(torch.nn.functional.conv2d(x, weight, cuda(16), padding=1))
        outputs.append(torch.nn.functional.conv2d(x.to(memory_format=torch.channels_last), weight, padding=1))

    launches = [launch.launches for launch in recorded(90, run) if launch.name == "aten.convolution"]
    assert launches == [2, 1]
    layouts = (torch.contiguous_format, torch.channels_last)
    assert [[t.is_contiguous(memory_format=layout) for layout in layouts] for t in outputs] == [
        [True, False],
        [False, True],
    ]


def test_the_decoder_runs_in_kernels_between_its_convolutions_and_copies_no_weight_and_no_map_to_enlarge_it():
    with torch.device("meta"):
        vae = VQVAE(64, 32, 32, (1, 2, 4), ch_mult=(1, 2, 2), num_res_blocks=1)

    def run(gpu):
        to_fake_cuda(vae)
        features = cuda(2, 32, 4, 4)
        vae.fhat_to_img(features)  # makes the copies of weights
        gpu.launches.clear()
        assert vae.fhat_to_img(features).is_contiguous()

    launches = recorded(90, run)
    counts = Counter(launch.name for launch in launches)
    assert not {"aten.native_group_norm", "aten.silu", "aten.upsample_nearest2d"} & set(counts)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in vae.decoder.modules())
    assert counts["_join_groups"] == counts["_normalize_channels"] == norms
    assert counts["_channel_moments"] + counts["_add_and_measure"] == norms, "a residual's launch measures its sum"
    blocks = sum(isinstance(module, ResnetBlock | AttnBlock) for module in vae.decoder.modules())
    assert counts["_add_residual"] + counts["_add_and_measure"] == blocks
    assert counts["_add_residual"] == 2, "before maps are enlarged, where no norm follows"
    attention = sum(isinstance(module, AttnBlock) for module in vae.decoder.modules())
    biases = sum(launch.launches - 1 for launch in launches if launch.name == "aten.convolution")
    assert biases == 3 + attention, "of post_quant_conv, conv_in, conv_out and the queries, keys and values"
    smallest = 2 * 32 * 4 * 4 * 4 * 4  # bytes of the middle's map
    clones = [launch for launch in launches if launch.name == "aten.clone" and launch.result.shape[-1] < 16]
    assert all(launch.bytes <= 3 * 2 * smallest for launch in clones), "of the smallest map alone"
    assert not {"aten._to_copy", "aten.constant_pad_nd", "aten.sum"} & set(counts)


def test_rows_that_are_looked_up_count_and_the_rest_of_the_table_does_not():
    table = torch.nn.functional.embedding
    (launch,) = recorded(90, lambda gpu: table(cuda(5, dtype=torch.int64), cuda(1000, 64)))
    assert launch.bytes == 5 * 8 + 2 * 5 * 64 * 4


def test_regions_mark_launches():
    def run(gpu):
        launch_scale(cuda(64))
        gpu.region = "block 0"
        launch_scale(cuda(64))

    assert [launch.region for launch in recorded(90, run)] == ["", "block 0"]


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.sum() > 0), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index.Tensor"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: torch.empty(4).copy_(x), "copy_"),
        (lambda x: torch.equal(x, x), "equal"),
    ],
    ids=["item", "bool", "nonzero", "index by mask", "cpu", "copy to host", "equal"],
)
def test_waiting_for_the_gpu_is_an_error_that_names_the_operation(wait, name):
    with pytest.raises(HostSyncError, match=f"aten.{name}"):
        recorded(90, lambda gpu: wait(cuda(4)))


def test_writing_under_a_mask_does_not_wait():
    def run(gpu):
        x = cuda(4)
        x[x > 0] = 1.0

    assert recorded(90, run)


def test_a_module_of_the_meta_device_moves_over():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)).eval()

    def run(gpu):
        to_fake_cuda(model, torch.bfloat16)
        assert model(cuda(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert model[1].num_batches_tracked.dtype == torch.int64
        assert model[0].weight.is_cuda

    assert [launch.name for launch in recorded(90, run)][:1] == ["aten.addmm"]


def test_everything_is_put_back():
    driver, pointer = triton.runtime.driver._active, FakeTensor.data_ptr
    with pytest.raises(HostSyncError):
        recorded(90, lambda gpu: cuda(1).item())
    assert triton.runtime.driver._active is driver
    assert FakeTensor.data_ptr is pointer
    assert type(torch.empty(1)) is torch.Tensor


def test_an_unknown_architecture_and_the_interpreter_are_refused(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"arch: expected one of \[80, 86, 89, 90, 100, 120, .*gfx1100.\], got 75"),
        virtual_gpu(75),
    ):
        pass
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(VirtualGPUUnavailableError, match="TRITON_INTERPRET"), virtual_gpu(90):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA no compiler is needed")
def test_without_a_compiler_there_is_no_virtual_gpu_and_the_reason_is_given(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(VirtualGPUUnavailableError, match=r"C\+\+ compiler: 'no-such-compiler' is not there"):
        recorded(90, launch_scale)
