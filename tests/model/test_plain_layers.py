"""Layers that are more than their weight are called, or refused by name; and a patch always comes off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from support.helpers import make_tiny_var, sample
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._pytree import tree_map

from actvar import ActVARConfig, accelerate, apply_patch, load_adapter, remove_patch, save_adapter
from actvar.models import VAR, transformer_block
from actvar.models.public_code import public_classes, public_twin
from actvar.utils.plain_layers import why_called

LINEARS = ["attn.proj", "ffn.fc1", "ffn.fc2", "ada_lin.1"]
CALLED = [*LINEARS, "attn", "ffn", "ada_lin", "ln_wo_grad"]
"""What the dense block calls; `mat_qkv` is not among it, since the model reads its weight alone."""


class LoRAByClass(nn.Linear):
    """As loralib's: a subclass of the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.3 * x @ self.down.T @ self.up.T


class LoRAByWrapper(nn.Module):
    """As peft's: a module around the layer, which shows its weight and sizes."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.base_layer(x, *args, **kwargs) + 0.3 * self.up(self.down(x))


class Quantised(torch.Tensor):
    """A weight in few bits without storage of its own, as torchao's."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.abs().max() / 3
        made.values = (weight / made.scale).round().to(torch.int8)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        plain = tree_map(lambda t: t.values * t.scale if isinstance(t, cls) else t, args)
        return func(*plain, **(kwargs or {}))


def as_subclass(block: nn.Module, name: str) -> None:
    layer = block.get_submodule(name)
    layer.__class__ = LoRAByClass
    torch.manual_seed(0)
    layer.down, layer.up = torch.randn(4, layer.in_features) * 0.3, torch.randn(layer.out_features, 4) * 0.3


def as_wrapper(block: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    block.set_submodule(name, LoRAByWrapper(block.get_submodule(name)))


def as_quantised(block: nn.Module, name: str) -> None:
    layer = block.get_submodule(name)
    layer.weight = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)


def as_spectral_norm(block: nn.Module, name: str) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(block.get_submodule(name)).eval()


def as_old_weight_norm(block: nn.Module, name: str) -> None:
    layer = weight_norm(block.get_submodule(name))
    layer.weight_g.data.mul_(1.5)


def as_pruned(block: nn.Module, name: str) -> None:
    prune.l1_unstructured(block.get_submodule(name), "weight", 0.5)


def with_a_forward_of_its_own(block: nn.Module, name: str) -> None:
    layer = block.get_submodule(name)
    layer.forward = lambda x, forward=layer.forward: 1.5 * forward(x)


WRAPS = [
    as_subclass,
    as_wrapper,
    as_quantised,
    as_spectral_norm,
    as_old_weight_norm,
    as_pruned,
    with_a_forward_of_its_own,
]


def forward_hook(layer: nn.Module, calls: list) -> None:
    layer.register_forward_hook(lambda module, inputs, output: calls.append("forward") or output * 1.25)


def forward_pre_hook(layer: nn.Module, calls: list) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: calls.append("before") or (inputs[0] * 1.25, *inputs[1:]))


def forward_hook_with_keywords(layer: nn.Module, calls: list) -> None:
    layer.register_forward_hook(
        lambda module, inputs, keywords, output: calls.append("keywords") or output * 1.25, with_kwargs=True
    )


HOOKS = [forward_hook, forward_pre_hook, forward_hook_with_keywords]


def close(found: torch.Tensor, due: torch.Tensor) -> None:
    torch.testing.assert_close(found, due, rtol=0, atol=2e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", LINEARS)
def test_images_are_those_of_the_dense_model(name: str, wrap: Callable, when: str) -> None:
    var, dense = make_tiny_var(), make_tiny_var()
    plain = sample(dense)
    wrap(dense.blocks[1], name)
    due = sample(dense)
    assert not torch.allclose(due, plain, atol=1e-4), "the test needs a layer that changes something"
    if when == "before":
        wrap(var.blocks[1], name)
        accelerate(var)
    else:
        sample(accelerate(var))
        wrap(var.blocks[1], name)
    close(sample(var), due)
    close(sample(remove_patch(var)), due)


@pytest.mark.public_var
@pytest.mark.parametrize("change", [*WRAPS, *HOOKS], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", LINEARS)
def test_images_of_the_public_class_are_those_of_its_dense_model(
    name: str, change: Callable, public_var_folder
) -> None:
    var = public_twin(make_tiny_var(), public_classes(public_var_folder))
    plain = sample(var)
    change(var.blocks[1], name) if change in WRAPS else change(var.blocks[1].get_submodule(name), [])
    due = sample(var)
    assert not torch.allclose(due, plain, atol=1e-4), "the test needs a layer that changes something"
    close(sample(accelerate(var)), due)
    close(sample(remove_patch(var)), due)


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
def test_the_head_is_called_as_by_the_dense_model(wrap: Callable) -> None:
    var, dense = make_tiny_var(), make_tiny_var()
    for model in (var, dense):
        wrap(model, "head")
    due = sample(dense)
    close(sample(accelerate(var)), due)
    close(sample(remove_patch(var)), due)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("name", [*CALLED, "head", "head_nm", "head_nm.ln_wo_grad", "word_embed"])
def test_hooks_run_as_often_as_in_the_dense_model(name: str, hook: Callable, when: str) -> None:
    def layer(model: VAR) -> nn.Module:
        return model.get_submodule(name) if hasattr(model, name.split(".")[0]) else model.blocks[0].get_submodule(name)

    var, dense, calls, calls_due = make_tiny_var(), make_tiny_var(), [], []
    hook(layer(dense), calls_due)
    due = sample(dense)
    if when == "before":
        hook(layer(var), calls)
        accelerate(var)
    else:
        sample(accelerate(var))
        hook(layer(var), calls)
    close(sample(var), due)
    assert calls == calls_due != []


def test_global_hooks_run_as_often_as_in_the_dense_model() -> None:
    var, dense, calls = accelerate(make_tiny_var()), make_tiny_var(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        sample(dense)
        due = calls.copy()
        calls.clear()
        sample(var)
    finally:
        handle.remove()
    for kind in (nn.Linear, nn.LayerNorm, transformer_block.SelfAttention, transformer_block.FeedForward, nn.GroupNorm):
        assert calls.count(kind) == due.count(kind) > 0


@pytest.mark.parametrize("kind", ["compact", "all"])
@pytest.mark.parametrize("name", ["attn.proj", "ada_lin.1"])
def test_sparse_scales_call_what_no_sparse_operation_reads(name: str, kind: str) -> None:
    config = ActVARConfig(num_experts=4, kv=kind)
    var, other = make_tiny_var(), make_tiny_var()
    as_wrapper(var.blocks[0], name)
    layer = other.blocks[0].get_submodule(name)
    wrapped = var.blocks[0].get_submodule(name)
    with torch.no_grad():  # what LoRA's merge does
        layer.weight += 0.3 * wrapped.up.weight @ wrapped.down.weight
    close(sample(apply_patch(var, config)), sample(apply_patch(other, config)))


@pytest.mark.parametrize("name", ["ffn.fc1", "ffn.fc2", "ffn", "ln_wo_grad"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_experts_on_a_layer_that_must_be_called_are_refused_by_name(name: str, when: str) -> None:
    var, config = make_tiny_var(), ActVARConfig(num_experts=4)
    if when == "after":
        sample(apply_patch(var, config))
    forward_hook(var.blocks[1].get_submodule(name), [])
    message = rf"blocks\[1\]\.{name.split('.')[0]}: expected plain layers.*forward hooks"
    with pytest.raises(TypeError, match=message):
        apply_patch(var, config) if when == "before" else sample(var)
    remove_patch(var)
    assert "actvar" not in var.__dict__
    sample(accelerate(var))


def test_static_experts_behind_a_norm_that_must_be_called_are_refused_by_name() -> None:
    var = make_tiny_var()
    forward_hook(var.blocks[1].ln_wo_grad, [])
    config = ActVARConfig(token_rates=(1, 1), ffn_rate=0.5, num_experts=4, static_experts=True)
    with pytest.raises(TypeError, match=r"blocks\[1\]\.ln_wo_grad: expected plain layers, which the experts can read"):
        apply_patch(var, config)


def test_attention_of_all_tokens_is_refused_by_name_where_it_must_be_called() -> None:
    var = make_tiny_var()
    forward_hook(var.blocks[0].attn, [])
    with pytest.raises(TypeError, match=r"blocks\[0\]\.attn: .*kv='all'"):
        apply_patch(var, ActVARConfig(num_experts=4, kv="all"))
    sample(apply_patch(var, ActVARConfig(num_experts=4)))


def test_one_line_names_what_is_not_fused(caplog: pytest.LogCaptureFixture) -> None:
    var = make_tiny_var()
    as_wrapper(var.blocks[0], "ffn.fc1")
    as_wrapper(var.blocks[1], "ffn.fc1")
    with caplog.at_level(logging.WARNING):
        accelerate(var)
        sample(var)
        sample(var)
    assert [record.message for record in caplog.records] == [
        "not fused, since only the layer itself computes what it is: "
        "ffn (fc1 is of test_plain_layers.LoRAByWrapper) in blocks 0, 1"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        accelerate(make_tiny_var())
    assert not caplog.records


def test_one_line_names_what_is_not_fused_any_more(caplog: pytest.LogCaptureFixture) -> None:
    var, calls = accelerate(make_tiny_var()), []
    sample(var)
    for layer in (*(block.attn.proj for block in var.blocks), var.head):
        forward_hook(layer, calls)
    with caplog.at_level(logging.WARNING):
        sample(var)
        sample(var)
    assert [record.message for record in caplog.records] == [
        "not fused, since only the layer itself computes what it is: "
        "attn.proj (has forward hooks) in blocks 0, 1; head (has forward hooks)"
    ]


@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", ["ffn.fc1", "ffn.fc2"])
def test_a_patch_with_reordered_units_comes_off_whatever_the_layers_have_become(tmp_path, name, wrap, caplog) -> None:
    config = ActVARConfig(num_experts=4)
    donor = apply_patch(make_tiny_var(), config)
    from actvar.sparse.block_state import set_order_and_gates

    set_order_and_gates(donor.blocks[0], torch.randperm(512, generator=torch.Generator().manual_seed(0)))
    save_adapter(donor, tmp_path / "adapter.safetensors")
    var, dense = make_tiny_var(), make_tiny_var()
    load_adapter(apply_patch(var, config), tmp_path / "adapter.safetensors")
    wrap(var.blocks[0], name)
    images = sample(remove_patch(var))
    assert images.isfinite().all()
    assert not any("actvar" in block._modules for block in var.blocks)
    if "reordered" not in caplog.text:
        wrap(dense.blocks[0], name)
        close(images, sample(dense))


def test_a_subclass_of_a_block_is_refused() -> None:
    class Other(transformer_block.TransformerBlock):
        def forward(self, x, cond_BD, attn_bias):
            return super().forward(x, cond_BD, attn_bias) * 2

    var = make_tiny_var()
    var.blocks[1].__class__ = Other
    with pytest.raises(TypeError, match=r"blocks\[1\] with the forward of a known class, got a Other"):
        accelerate(var)


def test_wrappers_of_blocks_and_models_are_looked_through() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    var, due = make_tiny_var(), sample(make_tiny_var())
    var.blocks[0] = checkpoint_wrapper(var.blocks[0])
    close(sample(accelerate(var)), due)
    assert hasattr(var.blocks[0]._checkpoint_wrapped_module, "actvar")
    close(sample(remove_patch(var)), due)
    parallel = nn.DataParallel(make_tiny_var())
    assert accelerate(parallel) is parallel
    close(sample(parallel.module), due)
    remove_patch(parallel)
    assert "actvar" not in parallel.module.__dict__


def test_sharded_models_are_refused_by_name() -> None:
    class FSDPModule:
        """Stands for the class that `fully_shard` mixes in."""

    var = make_tiny_var()
    kind = type(var.blocks[0])
    var.blocks[0].__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
    with pytest.raises(TypeError, match="whole parameters, got those of a FSDPTransformerBlock"):
        accelerate(var)


def test_a_deepcopy_of_a_patched_model_with_hooks_calls_them() -> None:
    var, calls = make_tiny_var(), []
    forward_hook(var.blocks[0].ffn, calls)
    due = sample(make_tiny_var())
    other = copy.deepcopy(accelerate(var))
    images = sample(other)
    assert calls
    assert not torch.allclose(images, due, atol=1e-3)


@pytest.mark.parametrize("name", ["mid.block_1.norm1", "mid.block_1.conv1", "up.1.block.0.conv2", "up.1.upsample.conv"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_of_the_decoder_see_what_they_see_with_gradients(name: str, hook: Callable) -> None:
    vae, calls = make_tiny_var(Cvae=16, ch_mult=(1, 1)).vae_proxy[0], []
    f_hat = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    layer = vae.decoder.get_submodule(name)
    hook(layer, calls)
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    due = vae.requires_grad_(True).fhat_to_img(f_hat)
    with torch.no_grad():
        found = vae.fhat_to_img(f_hat)
    close(found, due)
    close(*seen)
    assert len(calls) == 2


@pytest.mark.parametrize("wrap", [as_spectral_norm, as_old_weight_norm, as_pruned], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", ["mid.block_1.conv1", "up.1.upsample.conv", "conv_out"])
def test_convolutions_that_compute_their_weight_are_called(name: str, wrap: Callable) -> None:
    vae = make_tiny_var(Cvae=16).vae_proxy[0]
    f_hat = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    wrap(vae.decoder, name)
    vae.eval()
    due = vae.requires_grad_(True).fhat_to_img(f_hat)
    with torch.no_grad():
        close(vae.fhat_to_img(f_hat), due)


def test_the_reason_names_what_is_around_a_layer() -> None:
    layer = nn.Linear(4, 4)
    assert why_called(layer, nn.Linear) is None
    assert "LoRAByWrapper" in why_called(LoRAByWrapper(layer), nn.Linear)
    layer.register_forward_hook(lambda *_: None)
    assert why_called(layer, nn.Linear) == "has forward hooks"
