from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import sample
from torch import nn

from actvar import ActVARConfig, AdapterError, apply_patch, load_adapter, patched, remove_patch, save_adapter
from actvar.families.var import VARFamily
from actvar.patching.adapter import describe_adapter, gate_parameters
from actvar.patching.patch import unpatched
from actvar.utils.weight_override import replace_parameters, restore_parameters, tuned_parameters

CONFIG = ActVARConfig(num_experts=8)
CHANGED = ("head.weight", "blocks.0.attn.q_bias", "blocks.1.ffn.fc2.weight")


def tuned(var: nn.Module, names=CHANGED) -> nn.Module:
    """`var`, patched, with some weights halved."""
    apply_patch(var, CONFIG)
    replace_parameters(var, {name: nn.Parameter(var.get_parameter(name).detach() / 2) for name in names})
    return var.requires_grad_(False)


@pytest.fixture
def adapter(make_var, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(tuned(make_var()), path, {"stage": 2})
    return path


def state_of(var):
    return {name: tensor.clone() for name, tensor in var.state_dict().items()}


def assert_equal_state(left, right):
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_names_of_what_stage_two_trains(make_var):
    for var in (make_var(), make_var(shared_aln=True)):
        names = set(VARFamily().finetuned_names(var))
        frozen = {name for name, _ in var.named_parameters()} - names
        assert {"head.weight", "head.bias", "blocks.1.attn.scale_mul_1H11", "blocks.0.attn.proj.bias"} <= names
        assert {n for n in names if "ada" in n or "emb" in n or "pos" in n} == set()
        assert all("ada_" in n or "emb" in n or "pos_" in n for n in frozen)


def test_changed_weights_are_loaded_and_removed_bit_for_bit(make_var, adapter):
    var = make_var()
    own, before, image = dict(var.named_parameters()), state_of(var), sample(var)
    classes = {name: type(module) for name, module in var.named_modules()}
    apply_patch(var, CONFIG)
    load_adapter(var, adapter)
    assert sorted(tuned_parameters(var)) == sorted(CHANGED)
    assert torch.equal(var.head.weight, before["head.weight"] / 2)
    assert torch.equal(sample(var), sample(tuned(make_var())))
    remove_patch(var)
    assert_equal_state(state_of(var), before)
    assert torch.equal(sample(var), image)
    assert {name: type(module) for name, module in var.named_modules()} == classes
    assert all(parameter is own[name] for name, parameter in var.named_parameters())
    assert "originals" not in vars(var.head)


def test_changed_weights_act_at_all_scales(make_var, adapter):
    var = apply_patch(make_var(), CONFIG)
    labels, inputs = torch.tensor([3, 4]), torch.randn(2, var.L - 1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = var(labels, inputs)
        load_adapter(var, adapter)
        assert ((var(labels, inputs) - before).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_only_what_changed_is_held_twice(make_var, adapter):
    var = make_var()
    pointers = {name: p.data_ptr() for name, p in var.named_parameters()}
    load_adapter(apply_patch(var, CONFIG), adapter)
    moved = {name for name, p in var.named_parameters() if ".actvar." not in name and p.data_ptr() != pointers[name]}
    assert moved == set(CHANGED)


def test_the_state_dict_is_that_of_the_original_and_loads_into_it(make_var, adapter):
    var = make_var()
    before = state_of(var)
    load_adapter(apply_patch(var, CONFIG), adapter)
    assert_equal_state(state_of(var), before)
    assert_equal_state(nn.Sequential(var).state_dict(), {f"0.{name}": tensor for name, tensor in before.items()})
    changed = var.head.weight.clone()
    var.load_state_dict({name: torch.full_like(tensor, 3) for name, tensor in before.items()})
    assert torch.equal(var.head.weight, changed)
    assert (remove_patch(var).head.weight == 3).all()


def test_a_state_dict_can_be_assigned(make_var, adapter):
    var = load_adapter(apply_patch(make_var(), CONFIG), adapter)
    changed = var.head.weight.clone()
    given = {name: torch.full_like(tensor, 3) for name, tensor in var.state_dict().items()}
    var.load_state_dict(given, assign=True)
    assert torch.equal(var.head.weight, changed)
    assert remove_patch(var).head.weight.data_ptr() == given["head.weight"].data_ptr()


def test_conversion_reaches_both_the_changed_and_the_original_weights(make_var, adapter):
    var = load_adapter(apply_patch(make_var(), CONFIG), adapter)
    before, changed = state_of(var), var.blocks[0].attn.q_bias.clone()
    var.double()
    assert torch.equal(var.blocks[0].attn.q_bias, changed.double())
    remove_patch(var)
    assert_equal_state(var.state_dict(), {n: t.double() if t.is_floating_point() else t for n, t in before.items()})


def test_copies_and_pickles_have_both_weights(make_var, adapter):
    var = load_adapter(apply_patch(make_var(), CONFIG), adapter)
    before, image = state_of(var), sample(var)
    file = io.BytesIO()
    torch.save(var, file)
    file.seek(0)
    for twin in (copy.deepcopy(var), torch.load(file, weights_only=False)):
        assert torch.equal(sample(twin), image)
        remove_patch(twin)
        assert_equal_state(state_of(twin), before)
    assert torch.equal(sample(var), image)


def test_patching_again_or_another_adapter_drops_the_changed_weights(make_var, adapter, tmp_path):
    var = apply_patch(make_var(), CONFIG)
    before = state_of(var)
    gates_only = tmp_path / "gates.safetensors"
    save_adapter(var, gates_only)
    load_adapter(load_adapter(var, adapter), adapter)
    assert torch.equal(remove_patch(load_adapter(apply_patch(var, CONFIG), adapter)).head.weight, before["head.weight"])
    apply_patch(var, CONFIG)
    for drop in (lambda: load_adapter(var, gates_only), lambda: apply_patch(var, CONFIG)):
        load_adapter(var, adapter)
        drop()
        assert tuned_parameters(var) == {}
        assert torch.equal(var.head.weight, before["head.weight"])


def test_contexts_put_changed_weights_back(make_var, adapter):
    var = load_adapter(apply_patch(make_var(), CONFIG), adapter)
    image, weights = sample(var), tuned_parameters(var)
    dense = sample(make_var())
    with unpatched(var):
        assert torch.equal(sample(var), dense)
    with pytest.raises(TypeError, match="Linear cannot be patched"), unpatched(nn.Linear(2, 2)):
        pass
    with patched(var, ActVARConfig(token_rates=(1, 1), ffn_rate=1)):
        torch.testing.assert_close(sample(var), dense, atol=1e-4, rtol=0)
    with pytest.raises(AdapterError), patched(var, ActVARConfig(num_experts=16), adapter):
        pass
    assert torch.equal(sample(var), image)
    assert all(p is weights[name] for name, p in tuned_parameters(var).items())


def test_weights_follow_the_model_into_its_dtype(make_var, adapter):
    var = apply_patch(make_var().bfloat16(), CONFIG)
    load_adapter(var, adapter)
    stored = load_file(adapter)["weights.head.weight"]
    assert torch.equal(var.head.weight, stored.bfloat16())


def test_the_file_says_what_it_holds(adapter):
    facts = describe_adapter(adapter)
    assert facts["training"] == {"stage": 2}
    assert facts["changed weights"] == 64 * 128 + 128 + 128 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"weights.pos_1LC": torch.zeros(1, 39, 128)}), "weights.pos_1LC"),
        (lambda t: t.update({"weights.blocks.2.ffn.fc1.bias": torch.zeros(512)}), "weights.blocks.2"),
        (lambda t: t.update({"weights.head.weight": torch.zeros(64, 64)}), r"\[64, 128\], got \[64, 64\]"),
        (lambda t: t["weights.head.weight"].fill_(float("nan")), "finite"),
        (lambda t: t.update({"weights.head.weight": torch.full((64, 128), 1e6)}), "finite values in torch.float16"),
    ],
)
def test_wrong_weights_are_refused_and_the_model_is_unchanged(make_var, adapter, change, message):
    var = load_adapter(apply_patch(make_var(), CONFIG), adapter)
    var.half()
    gates, weights = {n: p.clone() for n, p in gate_parameters(var).items()}, tuned_parameters(var)
    tensors = load_file(adapter)
    change(tensors)
    with safe_open(adapter, "pt") as file:
        metadata = file.metadata()
    bad = adapter.with_name("bad.safetensors")
    save_file(tensors, bad, metadata)
    with pytest.raises(AdapterError, match=message):
        load_adapter(var, bad)
    assert all(torch.equal(p, gates[name]) for name, p in gate_parameters(var).items())
    assert all(p is weights[name] for name, p in tuned_parameters(var).items())


def test_restoring_an_untouched_model_changes_nothing(tiny_var):
    own = dict(tiny_var.named_parameters())
    restore_parameters(tiny_var)
    assert all(p is own[name] for name, p in tiny_var.named_parameters())


class CompilersWrapper(nn.Module):
    """What torch.compile puts around a block, as far as names go, without the time its import takes."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


def test_changed_weights_reach_blocks_inside_the_compilers_wrapper(make_var, adapter):
    var = make_var()
    before = state_of(var)
    for i, block in enumerate(var.blocks):
        var.blocks[i] = CompilersWrapper(block)
    load_adapter(apply_patch(var, CONFIG), adapter)
    assert sorted(tuned_parameters(var)) == sorted(CHANGED)
    assert torch.equal(var.blocks[1].ffn.fc2.weight, before["blocks.1.ffn.fc2.weight"] / 2)
    remove_patch(var)
    assert all(torch.equal(t, before[name.replace("_orig_mod.", "")]) for name, t in var.state_dict().items())
