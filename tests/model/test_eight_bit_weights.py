"""A model whose blocks multiply in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support.helpers import make_tiny_var, sample
from support.toy_family import STARTS, ToyFamily, ToyModel
from torch import nn
from torch.nn import functional as F

import actvar.families
from actvar import ActVARConfig, Execution, accelerate, apply_patch, load_adapter, remove_patch, save_adapter
from actvar.config import DENSE
from actvar.families import blocks_of, family_of
from actvar.families.var import VARFamily
from actvar.sampling.summary import summary
from actvar.utils.wrappers import unwrapped
from actvar_kernels import BackendUnavailableError
from actvar_kernels.backend import using_backend
from actvar_kernels.constants import FORMATS
from actvar_kernels.cpu_backend import brgemm, packing
from actvar_kernels.linear.cpu_brgemm import PackedWeight
from actvar_kernels.linear.quantized import quantized_linear

INT8 = Execution(weights="int8")
SPARSE = ActVARConfig(num_experts=8)
EVERY = pytest.mark.parametrize("weights", FORMATS)
LABELS = torch.tensor([0, 1])

needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")


def inputs_of(var: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and inputs of teacher forcing."""
    torch.manual_seed(0)
    maps = torch.randint(var.V, (2, sum(side * side for side in var.patch_nums)))
    return LABELS, family_of(var).teacher_input(var, LABELS, maps)


@pytest.fixture
def toy(monkeypatch) -> ToyModel:
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    return ToyModel().eval()


def toy_logits(model: ToyModel) -> torch.Tensor:
    torch.manual_seed(0)
    return model(LABELS, torch.randn(2, STARTS[-1] - 1 + 15, 4))


def in_blocks(var: nn.Module, quantized: torch.dtype) -> Callable:
    """Return a stand-in for `F.linear` that multiplies in eight bits by the weights of attention and FFN."""
    layers = [layer for block in var.blocks for layer in (block.attn.mat_qkv, block.attn.proj, *block.ffn.children())]
    weights = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
    plain = F.linear

    def linear(x, weight, bias=None):
        return quantized_linear(x, weight, bias, quantized) if id(weight) in weights else plain(x, weight, bias)

    return linear


def scale_logits(var: nn.Module) -> torch.Tensor:
    """Return the logits of all scales, computed scale by scale with the K/V cache."""
    found = family_of(var).scale_logits(unwrapped(var), *inputs_of(var))
    return torch.cat([logits for _, logits in found], dim=1)


@EVERY
@torch.no_grad()
def test_the_reference_is_the_dense_model_with_quantized_layers(tiny_var, weights):
    tiny_var.double()  # so that no number falls on the other side of a byte's edge
    dense = scale_logits(tiny_var)
    with mock.patch.object(F, "linear", in_blocks(tiny_var, FORMATS[weights])):
        due = scale_logits(tiny_var)
    accelerate(tiny_var, Execution(weights=weights))
    with using_backend("reference"):
        found = scale_logits(tiny_var)
    assert (found - due).abs().max() <= 1e-3 * (due - dense).abs().max()


@EVERY
@torch.no_grad()
def test_teacher_forcing_is_that_of_the_dense_model_with_quantized_layers(tiny_var, weights):
    tiny_var.double()  # so that no number falls on the other side of a byte's edge
    apply_patch(tiny_var, DENSE, Execution(weights=weights))
    arguments = inputs_of(tiny_var)
    with using_backend("reference"):
        found = tiny_var(*arguments)
    remove_patch(tiny_var)
    dense = tiny_var(*arguments)
    with mock.patch.object(F, "linear", in_blocks(tiny_var, FORMATS[weights])):
        due = tiny_var(*arguments)
    assert (found - due).abs().max() <= 1e-3 * (due - dense).abs().max()


@needs_bytes
@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, SPARSE, replace(SPARSE, kv="all"), ActVARConfig(guidance_until=-2)])
def test_kernels_err_as_the_reference_does(tiny_var, config):
    apply_patch(tiny_var, config)
    arguments = inputs_of(tiny_var)
    with tiny_var.actvar.during(rows_stand_alone=True), using_backend("reference"):
        plain = tiny_var(*arguments)
    apply_patch(tiny_var, config, INT8)
    with tiny_var.actvar.during(rows_stand_alone=True):
        found = tiny_var(*arguments)
        with using_backend("reference"):
            due = tiny_var(*arguments)
    assert (found - due).norm() <= 0.3 * (due - plain).norm()


@needs_bytes
@torch.no_grad()
def test_no_layer_of_a_block_is_packed_in_another_format(tiny_var):
    apply_patch(tiny_var, SPARSE, INT8)
    sample(tiny_var)
    for block in blocks_of(tiny_var):
        for layer in (block.attn.mat_qkv, block.attn.proj, block.ffn.fc1):
            copies = [found.copy for found in packing._cache[id(layer.weight)].values()]
            formats = {(copy if isinstance(copy, PackedWeight) else copy.up).panels.dtype for copy in copies}
            assert formats == {torch.int8}
            assert len(copies) == 1


@needs_bytes
@torch.no_grad()
def test_a_choice_per_block_holds_for_that_block(tiny_var):
    count = len(tiny_var.blocks)
    accelerate(tiny_var, Execution(weights=("int8",) + (count - 1) * (None,)))
    sample(tiny_var)
    first, last = (block.attn.proj.weight for block in (tiny_var.blocks[0], tiny_var.blocks[-1]))
    assert any(isinstance(found.copy, PackedWeight) for found in packing._cache[id(first)].values())
    assert not any(isinstance(found.copy, PackedWeight) for found in packing._cache[id(last)].values())


def test_another_number_of_blocks_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"weights: the model has \d+ blocks, got 7"):
        accelerate(tiny_var, Execution(weights=7 * ("int8",)))


@pytest.mark.parametrize("weights", ["int4", 8, ("int8", "e4m3")])
def test_an_unknown_format_is_refused(weights):
    with pytest.raises((TypeError, ValueError), match="weights"):
        Execution(weights=weights)


@pytest.mark.parametrize("weights", [None, "int8", "fp8", ("int8", None, "fp8")])
def test_the_format_survives_a_file(weights):
    execution = Execution(weights=weights)
    assert Execution.from_json(execution.to_json()) == execution


def test_an_adapter_recommends_the_format(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(apply_patch(make_tiny_var(), SPARSE, INT8), path, execution=INT8)
    var = make_tiny_var()
    load_adapter(var, path)
    assert var.actvar.execution == INT8


def test_fp8_on_a_cpu_is_refused_by_the_first_sample(tiny_var):
    accelerate(tiny_var, Execution(weights="fp8"))
    with pytest.raises(
        BackendUnavailableError, match=r"linear in fp8 cannot run this call: C\+\+ has no products of fp8"
    ):
        sample(tiny_var)


@pytest.mark.parametrize("path", ["attn.proj", "ffn.fc1", "ln_wo_grad"])
def test_a_layer_that_must_be_called_is_refused_by_name(tiny_var, path):
    tiny_var.blocks[1].get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"blocks\[1\].*products in eight bits.*leave Execution.weights None"):
        accelerate(tiny_var, INT8)


@needs_bytes
def test_a_hook_that_comes_later_is_refused_by_the_next_sample(tiny_var):
    accelerate(tiny_var, INT8)
    sample(tiny_var)
    tiny_var.blocks[1].ffn.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"blocks\[1\].ffn"):
        sample(tiny_var)


@EVERY
@torch.no_grad()
def test_a_compiled_model_runs_the_reference(tiny_var, weights):
    accelerate(tiny_var, Execution(weights=weights))
    arguments = inputs_of(tiny_var)
    found = torch.compile(tiny_var, backend="eager")(*arguments)
    with using_backend("reference"):
        assert torch.equal(found, tiny_var(*arguments))


def test_training_is_refused(tiny_var):
    apply_patch(tiny_var, DENSE, INT8)
    with torch.enable_grad(), pytest.raises(BackendUnavailableError, match="no gradient"):
        tiny_var.requires_grad_()(*inputs_of(tiny_var))


def test_a_family_that_does_not_multiply_in_eight_bits_is_refused(toy, monkeypatch):
    monkeypatch.setattr(ToyFamily, "takes_eight_bits", False)
    with pytest.raises(ValueError, match="does not multiply in eight bits; leave it None"):
        apply_patch(toy, DENSE, INT8)


@EVERY
@torch.no_grad()
def test_another_family_multiplies_in_eight_bits_too(toy, weights):
    plain = toy_logits(toy)
    apply_patch(toy, DENSE, Execution(weights=weights))
    with using_backend("reference"):
        due = toy_logits(toy)
    assert 0 < (due - plain).norm() <= 0.2 * plain.norm()
    if weights == "int8" and brgemm.runs(torch.int8):
        assert (toy_logits(toy) - due).norm() <= 0.3 * (due - plain).norm()


@needs_bytes
@torch.no_grad()
def test_removal_restores_the_model_bit_for_bit(tiny_var):
    before, state = scale_logits(tiny_var), {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    accelerate(tiny_var, INT8)
    assert not torch.equal(scale_logits(tiny_var), before)
    remove_patch(tiny_var)
    assert torch.equal(scale_logits(tiny_var), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_var.state_dict().items())


def test_the_summary_names_the_format(tiny_var):
    accelerate(tiny_var, INT8)
    assert "products of the blocks in int8" in summary(tiny_var)
    count = len(tiny_var.blocks)
    accelerate(tiny_var, Execution(weights=("int8",) + (count - 1) * (None,)))
    assert f"products of 1 of {count} blocks in int8" in summary(tiny_var)
    accelerate(tiny_var, Execution(weights=("int8",) + (count - 1) * ("fp8",)))
    lines = summary(tiny_var).splitlines()
    assert lines.index(f"products of 1 of {count} blocks in int8") + 1 == lines.index(
        f"products of {count - 1} of {count} blocks in fp8"
    )
