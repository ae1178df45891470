"""The global default dtype and default device have no say in what a model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import make_tiny_var, sample

from actvar import ActVARConfig, Execution, accelerate, apply_patch, load_adapter, save_adapter
from actvar.calibrate import calibrate
from actvar.distill.data import sampled_source
from actvar.distill.run import Distillation, distill
from actvar.models import VAR
from actvar.models.public_code import public_classes, public_twin
from actvar.patching.adapter import read_adapter
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu

DEFAULTS = [torch.float16, torch.bfloat16, torch.float64, "meta"]
"""Dtypes, and a device on which no kernel of the CPU could write."""


@pytest.fixture(params=DEFAULTS, ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A function that changes the default dtype or device until the test ends."""
    dtype = torch.get_default_dtype()

    def change() -> None:
        if isinstance(request.param, str):
            torch.set_default_device(request.param)
        else:
            torch.set_default_dtype(request.param)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def backends() -> list[str]:
    return ["auto", "reference", *(["cpu"] if cpu.why_unavailable() is None else [])]


def dense(var: VAR) -> VAR:
    return var


def patched(var: VAR) -> VAR:
    return apply_patch(var, ActVARConfig(num_experts=4), Execution(sampler="fast"))


@pytest.mark.parametrize("prepare", [dense, accelerate, apply_patch, patched])
@pytest.mark.parametrize("backend", backends())
def test_images_are_those_without_another_default(
    other_default: Callable[[], None], prepare: Callable[[VAR], VAR], backend: str
) -> None:
    with using_backend(backend):
        expected = sample(prepare(make_tiny_var()))
        var = make_tiny_var()
        other_default()
        images = var.autoregressive_infer_cfg if prepare is dense else prepare(var).autoregressive_infer_cfg
        labels = torch.tensor([1, 2], device="cpu")
        found = images(2, labels, g_seed=0, cfg=1.5, top_k=20, top_p=0.95)
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.public_var
@pytest.mark.parametrize("prepare", [accelerate, apply_patch])
def test_images_of_the_public_class_are_those_without_another_default(
    other_default: Callable[[], None], prepare: Callable, public_var_folder: Path
) -> None:
    var = prepare(public_twin(make_tiny_var(), public_classes(public_var_folder)))
    labels = torch.tensor([1, 2], device="cpu")
    expected = var.autoregressive_infer_cfg(2, labels, g_seed=0, cfg=1.5, top_k=20, top_p=0.95)
    other_default()
    assert torch.equal(var.autoregressive_infer_cfg(2, labels, g_seed=0, cfg=1.5, top_k=20, top_p=0.95), expected)


@pytest.mark.parametrize("backend", backends())
def test_random_labels_and_mixed_codes_are_those_without_another_default(
    other_default: Callable[[], None], backend: str
) -> None:
    arguments = dict(g_seed=[3, 4], top_k=20, more_smooth=True)
    with using_backend(backend):
        expected = accelerate(make_tiny_var()).autoregressive_infer_cfg(2, None, **arguments)
        var = accelerate(make_tiny_var())
        other_default()
        assert torch.equal(var.autoregressive_infer_cfg(2, None, **arguments), expected)


def test_the_autoencoder_encodes_and_decodes_as_without_another_default(other_default: Callable[[], None]) -> None:
    vae = make_tiny_var().vae_proxy[0]
    images = torch.rand(2, 1, 10, 10, generator=torch.Generator("cpu").manual_seed(0)) * 2 - 1
    tokens = vae.img_to_idxBl(images)
    decoded = vae.idxBl_to_img(tokens)
    inputs = vae.quantize.teacher_input(tokens)
    other_default()
    assert all(map(torch.equal, vae.img_to_idxBl(images), tokens))
    assert torch.equal(vae.idxBl_to_img(tokens), decoded)
    assert torch.equal(vae.quantize.teacher_input(tokens), inputs)


def test_calibration_gives_the_adapter_that_it_gives_without_another_default(
    other_default: Callable[[], None], tmp_path: Path
) -> None:
    expected, var = make_tiny_var(), make_tiny_var()
    config = ActVARConfig(num_experts=4)
    calibrate(expected, config, images=8)
    other_default()
    calibrate(var, config, images=8)
    assert var.actvar.config == expected.actvar.config
    for found, wanted in zip(var.blocks, expected.blocks, strict=True):
        assert torch.equal(found.actvar.hidden_order, wanted.actvar.hidden_order)
        assert torch.equal(found.actvar.router.weight, wanted.actvar.router.weight)
        assert torch.equal(found.actvar.selector.weight, wanted.actvar.selector.weight)
    save_adapter(var, tmp_path / "adapter.safetensors")
    load_adapter(var, tmp_path / "adapter.safetensors")
    labels = torch.tensor([1, 2], device="cpu")
    images = [model.autoregressive_infer_cfg(2, labels, g_seed=0) for model in (var, expected)]
    assert torch.equal(*images)


@pytest.mark.parametrize("stage", [1, 2])
def test_distillation_gives_the_adapter_that_it_gives_without_another_default(
    other_default: Callable[[], None], tmp_path: Path, stage: int
) -> None:
    start = make_tiny_var()
    apply_patch(start, ActVARConfig(num_experts=4))
    adapter = tmp_path / "start.safetensors"
    save_adapter(start, adapter)

    models = [make_tiny_var() for _ in range(2)]
    config = ActVARConfig(num_experts=4)

    def trained(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        var, out = models.pop(), tmp_path / name / "adapter.safetensors"
        out.parent.mkdir()
        how = Distillation(stage, batch=4, epochs=1)
        distill(var, config, adapter, sampled_source(var, 8, seed=0), how, out)
        labels = torch.tensor([1, 2], device="cpu")
        return read_adapter(out).tensors, var.autoregressive_infer_cfg(2, labels, g_seed=0)

    expected, images = trained("expected")
    other_default()
    found, same = trained("found")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(same, images)
