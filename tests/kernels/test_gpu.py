"""The kernels on a real GPU: what `benchmarks/gpu.py` checks, and whole models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text

from actvar import (
    ActVARConfig,
    Execution,
    GraphedSampling,
    accelerate,
    apply_patch,
    load_adapter,
    load_pretrained,
    release_cache,
)
from actvar.models.quantizer import VectorQuantizer, upsampled_by_axis
from actvar.patching.patch import reconfigure
from actvar.zoo.pretrained import adapter_path
from actvar_kernels import add_codes, linears
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3.codes import reference as codes_added
from actvar_kernels.linear.linears import reference as layers_alone
from actvar_kernels.token_draw import public
from benchmarks.gpu import eight_bit_numerics, few_rows, graphs, launches, numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, torch found none"),
]


@pytest.mark.parametrize(
    "check",
    [
        numerics,
        eight_bit_numerics,
        graphs,
        lambda: launches(["d16", "d30"], [1, 8]),
        lambda: few_rows(["d16", "d30"], [1, 8]),
    ],
)
def test_every_operation_on_the_gpu(check):
    rows = list(check())
    assert rows
    assert [row for row in rows if not row.get("passed", "skipped" in row)] == []


@pytest.mark.parametrize("schedule", ["dense", "tile_list"])
def test_the_bundled_model_gives_the_reference_logits_on_the_gpu(schedule):
    """At rates of 1, so that rounding cannot choose other tokens or experts."""
    vae, var = load_pretrained("fashion-mnist")
    vae.cuda()
    var.cuda().double()
    execution = Execution(expert_execution=schedule)
    apply_patch(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True), execution)
    labels = torch.arange(10, device="cuda")
    tokens = torch.randint(var.V, (10, var.L), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    inputs = vae.quantize.teacher_input(tokens.split([side * side for side in var.patch_nums], dim=1))
    with torch.no_grad():
        exact = logits_on("reference", var, labels, inputs.double())
        var.float()
        reference = (logits_on("reference", var, labels, inputs) - exact).abs().max()
        assert (logits_on("triton", var, labels, inputs) - exact).abs().max() <= 4 * reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_decoder_on_the_gpu(dtype):
    vae, _ = load_pretrained("fashion-mnist")
    vae.cuda()
    side = vae.quantize.v_patch_nums[-1]
    tokens = torch.randint(vae.vocab_size, (20, side * side), device="cuda", generator=torch.Generator("cuda"))
    features = vae.quantize.code_map(tokens, side)

    def decoded(backend: str) -> torch.Tensor:
        with using_backend(backend), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return vae.fhat_to_img(features)

    reference, kernels = decoded("reference"), decoded("triton")
    assert kernels.dtype == reference.dtype
    vae.double()
    with using_backend("reference"):
        exact = vae.fhat_to_img(features.double())
    assert (kernels - exact).abs().max() <= 4 * (reference - exact).abs().max()


@pytest.mark.parametrize(("side", "larger"), [(1, 16), (5, 16), (13, 16), (24, 32)])
@torch.no_grad()
def test_bicubic_by_axis_gives_the_same_bits_on_the_gpu(side, larger):
    maps = torch.randn(64, 32, side, side, device="cuda", generator=torch.Generator("cuda"))
    expected = torch.nn.functional.interpolate(maps, size=(larger, larger), mode="bicubic")
    assert torch.equal(upsampled_by_axis(maps, larger), expected)


@torch.no_grad()
def test_a_scale_is_added_on_the_gpu_as_on_the_cpu():
    quantizer = VectorQuantizer(64, 32, (1, 2, 5, 13, 16))
    codes, partial = torch.randn(8, 32, 5, 5), torch.randn(8, 32, 16, 16)
    expected = quantizer.add_scale(2, partial.clone(), codes)
    found = quantizer.cuda().add_scale(2, partial.cuda(), codes.cuda())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_layers_of_one_input_and_the_codes_of_a_scale_err_no_more_than_pytorch(dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def expect_close(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        assert (found.cpu() - exact).abs().max() <= 4 * (plain - exact).abs().max()

    for rows in (2, 40, 130):
        layers = [
            [normal(rows, 256)],
            [normal(192, 256, std=1 / 16) for _ in range(3)],
            [normal(192) for _ in range(3)],
        ]
        (x,), *parts = [[tensor.double() for tensor in tensors] for tensors in layers]
        (on_gpu,), *others = [[tensor.cuda() for tensor in tensors] for tensors in layers]
        expect_close(linears(on_gpu, *others), layers_alone(layers[0][0], *layers[1:]), layers_alone(x, *parts))

    tensors = [normal(32, 32, 16, 16), torch.randint(64, (32, 25), generator=generator), normal(64, 32)]
    tensors += [normal(32, 32, 3, 3, std=1 / 17), normal(32)]
    exact, plain = [t.double() if t.is_floating_point() else t for t in tensors], [t.clone() for t in tensors]
    on_gpu = [tensor.cuda() for tensor in tensors]
    averages = (
        add_codes(*on_gpu, 0.5, 6),
        codes_added(*plain, 0.5, 6, dtype),
        codes_added(*exact, 0.5, 6, torch.float64),
    )
    expect_close(*averages)
    expect_close(on_gpu[0], plain[0], exact[0])


def test_a_graph_of_a_whole_sample_gives_the_images_of_eager_sampling():
    _, var = load_pretrained("fashion-mnist", device="cuda")
    apply_patch(var, ActVARConfig(), Execution(sampler="fast"))
    load_adapter(var, adapter_path("fashion-mnist", "paper"))
    draw = dict(top_k=100, top_p=0.95)
    for wanted in ("auto", True):
        for labels, seed in ((torch.arange(10), 0), (torch.arange(10).flip(0), [*range(10)]), (torch.arange(4), 2)):
            labels = labels.cuda()
            images = {}
            for graph in (False, wanted):
                reconfigure(var, ActVARConfig(), Execution(sampler="fast", cuda_graph=graph))
                images[graph] = [
                    var.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, **draw) for _ in range(3)
                ]
                assert len(var.actvar.graphs.graphs) == (1 if graph else 0)
            assert all(torch.equal(image, images[False][0]) for image in images[wanted])
            if isinstance(seed, int):
                assert torch.equal(GraphedSampling(var, **draw)(labels, seed), images[False][0])
    release_cache(var)
    assert var.actvar.graphs.pool is None


def test_a_graph_of_infinity_serves_texts_of_other_lengths():
    _, infinity = tiny_infinity()
    infinity.vae_proxy[0].cuda()
    accelerate(infinity.cuda().bfloat16(), Execution(sampler="fast"))
    drawn = {}
    for graph in (False, "auto", True):
        reconfigure(infinity, infinity.actvar.config, Execution(sampler="fast", cuda_graph=graph))
        for lengths, seed in (([3, 5], 0), ([12, 1], [4, 5]), ([7, 7], 1)):
            text = tiny_text(lengths)[0].cuda()
            arguments = dict(g_seed=seed, tau=1.0, return_bits=True)
            images, bits = infinity.sample(text, lengths, TINY_SCHEDULE, **arguments)
            drawn[graph, lengths[0]] = [images, *bits]
            assert all(map(torch.equal, drawn[graph, lengths[0]], drawn[False, lengths[0]]))
        assert len(infinity.actvar.graphs.graphs) == (2 if graph else 0)  # seeds of the batch, and of each image


def test_images_drawn_together_are_those_drawn_alone():
    probabilities = torch.randn(5, 64, 512, device="cuda").softmax(dim=-1)
    alone, together = ([torch.Generator("cuda").manual_seed(seed) for seed in range(5)] for _ in range(2))
    expected = [public.draw(image, generator) for image, generator in zip(probabilities, alone, strict=True)]
    assert torch.equal(public.draw_by_image(probabilities, together), torch.stack(expected))


LABELS = """
import sys, torch
from actvar.models.arguments import checked_labels
labels = torch.tensor([0, -1, int(sys.argv[1])], device="cuda")
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
checked = checked_labels(3, labels, 10, labels.device)
torch.cuda.set_sync_debug_mode("default")
print(checked.tolist())
"""


@pytest.mark.parametrize(("label", "printed"), [(9, "[0, 10, 9]"), (10, None), (2**40, None)])
def test_labels_are_checked_without_waiting_for_the_gpu(label, printed):
    command = [sys.executable, "-c", LABELS, str(label)]
    done = subprocess.run(command, capture_output=True, text=True)
    if printed is not None:
        assert done.stdout.strip() == printed, done.stderr
    else:
        assert "device-side assert" in done.stderr


def logits_on(backend: str, var: torch.nn.Module, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    with using_backend(backend):
        return var(labels, inputs).double()
