"""An adapter may reorder the hidden units of the FFN: weights, `state_dict` and copies agree with the order."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import CONFIG, assert_refused, rewritten
from support.helpers import sample

from actvar import (
    apply_patch,
    load_adapter,
    patched,
    remove_patch,
    save_adapter,
)


@pytest.fixture
def ordered(adapter):
    """Write an adapter that also reorders the hidden units of both blocks."""
    generator = torch.Generator().manual_seed(1)
    orders = {f"blocks.{i}.order": torch.randperm(512, generator=generator).int() for i in range(2)}
    return rewritten(adapter, load_file(adapter) | orders)


def weights_of(var):
    return {name: parameter.clone() for name, parameter in var.named_parameters() if ".actvar." not in name}


def assert_same_weights(var, expected):
    found = weights_of(var)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_order_moves_the_hidden_units_of_every_block(ordered, tiny_var):
    before = weights_of(tiny_var)
    load_adapter(apply_patch(tiny_var, CONFIG), ordered)
    for index, block in enumerate(tiny_var.blocks):
        order = load_file(ordered)[f"blocks.{index}.order"].tolist()
        for new, old in enumerate(order):
            assert torch.equal(block.ffn.fc1.weight[new], before[f"blocks.{index}.ffn.fc1.weight"][old])
            assert block.ffn.fc1.bias[new] == before[f"blocks.{index}.ffn.fc1.bias"][old]
            assert torch.equal(block.ffn.fc2.weight[:, new], before[f"blocks.{index}.ffn.fc2.weight"][:, old])
    remove_patch(tiny_var)
    assert_same_weights(tiny_var, before)


def test_an_order_is_counted_from_the_original_one_however_often_adapters_are_loaded(ordered, tiny_var, tmp_path):
    before = weights_of(tiny_var)
    load_adapter(apply_patch(tiny_var, CONFIG), ordered)
    once = weights_of(tiny_var)
    assert_same_weights(load_adapter(tiny_var, ordered), once)
    with patched(tiny_var, CONFIG):
        assert_same_weights(tiny_var, before)
    assert_same_weights(tiny_var, once)
    save_adapter(tiny_var, tmp_path / "saved.safetensors")
    assert_same_weights(load_adapter(apply_patch(tiny_var, CONFIG), tmp_path / "saved.safetensors"), once)
    plain = {name: tensor for name, tensor in load_file(ordered).items() if "order" not in name}
    assert_same_weights(load_adapter(tiny_var, rewritten(ordered, plain)), before)


def test_the_state_dict_of_a_reordered_model_is_in_the_original_order(ordered, tiny_var, make_var):
    state = {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    load_adapter(apply_patch(tiny_var, CONFIG), ordered)
    reordered = weights_of(tiny_var)
    again = tiny_var.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    tiny_var.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    tiny_var.load_state_dict(state)
    assert_same_weights(tiny_var, reordered)
    block = tiny_var.blocks[0]
    assert torch.equal(block.state_dict()["ffn.fc1.weight"], state["blocks.0.ffn.fc1.weight"])
    with pytest.raises(RuntimeError, match="size mismatch for blocks"):
        tiny_var.load_state_dict(state | {"blocks.0.ffn.fc1.weight": torch.zeros(4, 128)})


def test_a_reordered_model_survives_copies(ordered, tiny_var):
    before = weights_of(tiny_var)
    load_adapter(apply_patch(tiny_var, CONFIG), ordered)
    image, twin = sample(tiny_var), copy.deepcopy(tiny_var)
    assert torch.equal(sample(twin), image)
    remove_patch(twin)
    assert_same_weights(twin, before)
    assert torch.equal(sample(tiny_var), image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order: order.float(), r"expected 512 integers, got shape .* in torch.float32"),
        (lambda order: order[:-1], "expected 512 integers"),
        (lambda order: order.clamp_min(1), "each of 0 ... 511 once"),
        (lambda order: order + 1, "each of 0 ... 511 once"),
        (lambda order: order - 1, "each of 0 ... 511 once"),
    ],
)
def test_an_order_that_is_no_permutation_is_refused(ordered, tiny_var, change, message):
    tensors = load_file(ordered)
    tensors["blocks.1.order"] = change(tensors["blocks.1.order"])
    before = weights_of(tiny_var)
    assert_refused(apply_patch(tiny_var, CONFIG), rewritten(ordered, tensors), message)
    assert_same_weights(tiny_var, before)


def test_weights_made_in_inference_mode_are_reordered_as_others(ordered, make_var):
    var, other = make_var(), load_adapter(apply_patch(make_var(), CONFIG), ordered)
    with torch.inference_mode():
        fc1 = var.blocks[1].ffn.fc1
        fc1.weight = torch.nn.Parameter(fc1.weight.clone(), requires_grad=False)
    before = weights_of(var)
    apply_patch(var, CONFIG)
    untrained = sample(var)  # packs the weights, which tell nobody that they are changed
    assert torch.equal(sample(load_adapter(var, ordered)), sample(other))
    assert_same_weights(remove_patch(var), before)
    assert torch.equal(sample(apply_patch(var, CONFIG)), untrained)


def test_weights_that_became_inference_tensors_come_back_bit_for_bit(ordered, make_var):
    var, other = make_var(), make_var()
    load_adapter(apply_patch(var, CONFIG), ordered)
    with torch.inference_mode():
        var.to(torch.bfloat16)
    assert var.blocks[0].ffn.fc1.weight.is_inference()
    assert_same_weights(remove_patch(var), weights_of(other.to(torch.bfloat16)))


def test_the_default_device_has_no_say(ordered, tiny_var, make_var):
    expected = sample(load_adapter(apply_patch(make_var(), CONFIG), ordered))
    with torch.device("meta"):
        load_adapter(apply_patch(tiny_var, CONFIG), ordered)
    assert torch.equal(sample(tiny_var), expected)
