"""A sample and a decode use the weights that the model has when they begin, however these were changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import make_tiny_var, sample
from torch import nn

import actvar
from actvar import ActVARConfig, accelerate, apply_patch, refresh, release_cache, remove_patch
from actvar.models import VAR
from actvar.models.public_code import public_classes, public_twin
from actvar_kernels import conv3x3, expert_ffn, linear
from actvar_kernels.cpu_backend import cpu, packing
from actvar_kernels.cpu_backend.checksums import checksums

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


def by_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(-1.25)


def by_numpy(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= -1.25


def in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        by_data(module)


def by_swapped_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * -1.25


def by_exchanged_rows(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data.flip(0))


def by_one_number(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.view(-1)[-1] += 500


def by_a_flat_buffer(module: nn.Module) -> None:
    """As FSDP and DeepSpeed keep parameters: views of one buffer, which is changed."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.data.flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    flat.mul_(-1.25)


def by_load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: -1.25 * value for name, value in module.state_dict().items()})


def by_assignment(module: nn.Module) -> None:
    module.load_state_dict({name: -1.25 * value for name, value in module.state_dict().items()}, assign=True)


def by_optimizer(kind: type, **options) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for parameter in module.requires_grad_(True).parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        kind(module.parameters(), lr=0.5, **options).step()
        module.requires_grad_(False)
        module.zero_grad(set_to_none=True)

    change.__name__ = f"{kind.__name__} {options}"
    return change


CHANGES = [
    by_data,
    by_numpy,
    in_inference_mode,
    by_swapped_data,
    by_exchanged_rows,
    by_one_number,
    by_a_flat_buffer,
    by_load_state_dict,
    by_assignment,
    by_optimizer(torch.optim.AdamW, fused=True),
    by_optimizer(torch.optim.SGD, fused=True),
    by_optimizer(torch.optim.AdamW, foreach=True),
]
PARTS = ["head", "blocks.1.attn.proj", "blocks.0.attn.mat_qkv", "blocks.1.ffn.fc1", "blocks.0.ffn.fc2", "blocks.1"]


def named(change: Callable) -> str:
    return change.__name__


@pytest.mark.parametrize("change", CHANGES, ids=named)
@pytest.mark.parametrize("part", PARTS)
def test_a_sample_of_an_accelerated_model_has_the_changed_weights(change: Callable, part: str) -> None:
    var = accelerate(make_tiny_var())
    before = sample(var)
    change(var.get_submodule(part))
    found = sample(var)
    due = sample(remove_patch(var))
    assert not torch.allclose(due, before, atol=1e-3)
    torch.testing.assert_close(found, due, rtol=0, atol=1e-4)


@pytest.mark.public_var
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_a_sample_of_the_public_class_has_the_changed_weights(change: Callable, public_var_folder: Path) -> None:
    var = accelerate(public_twin(make_tiny_var(), public_classes(public_var_folder)))
    sample(var)
    change(var.blocks[1])
    found = sample(var)
    torch.testing.assert_close(found, sample(remove_patch(var)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_a_sample_with_selection_and_experts_has_the_changed_weights(change: Callable) -> None:
    config = ActVARConfig(num_experts=4)
    var, other = apply_patch(make_tiny_var(), config), make_tiny_var()
    before = sample(var)
    for model in (var, other):
        change(model.blocks[1].ffn.fc2)
        change(model.head)
    due = sample(apply_patch(other, config))
    assert not torch.equal(due, before)
    assert torch.equal(sample(var), due)


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_a_router_that_is_changed_chooses_anew(change: Callable) -> None:
    config = ActVARConfig(num_experts=4)
    var, other = (apply_patch(make_tiny_var(), config) for _ in range(2))
    sample(var)
    for model in (var, other):
        for block in model.blocks:
            block.actvar.router.weight.data.flip(0)
            change(nn.ParameterList([block.actvar.router.weight]))
    assert torch.equal(sample(var), sample(other))


@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_an_autoencoder_decodes_and_encodes_with_the_changed_weights(change: Callable) -> None:
    vae = make_tiny_var(Cvae=16).vae_proxy[0]
    f_hat = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    image = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        before = vae.fhat_to_img(f_hat)
        vae.img_to_idxBl(image)
        change(vae.decoder.mid.block_1.conv1)
        change(vae.encoder.mid.block_1.conv1)
        found, tokens = vae.fhat_to_img(f_hat), vae.img_to_idxBl(image)
        packing.drop(vae.parameters())
        due, tokens_due = vae.fhat_to_img(f_hat), vae.img_to_idxBl(image)
    assert not torch.equal(due, before)
    assert torch.equal(found, due)
    assert all(map(torch.equal, tokens, tokens_due))


def test_a_loop_of_your_own_over_the_blocks_has_the_changed_weights() -> None:
    var = accelerate(make_tiny_var())

    @torch.no_grad()
    def logits() -> torch.Tensor:
        condition = var.condition(torch.tensor([1, 2, 10, 10]))
        for block in var.blocks:
            block.attn.kv_caching(True)
        found = var.predict(0, None, condition)
        for block in var.blocks:
            block.attn.kv_caching(False)
        return found

    before = logits()
    by_data(var.blocks[1].attn.proj)
    by_data(var.head)
    found = logits()
    remove_patch(var)
    due = logits()
    assert not torch.allclose(due, before, atol=1e-3)
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-4)


def test_teacher_forcing_without_gradients_has_the_changed_weights() -> None:
    config = ActVARConfig(num_experts=4)
    var, other = (apply_patch(make_tiny_var(), config) for _ in range(2))
    labels, inputs = torch.tensor([1, 2]), torch.randn(2, var.L - 1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        var(labels, inputs)
        for model in (var, other):
            by_data(model.blocks[1])
            by_data(model.head)
        assert torch.equal(var(labels, inputs), other(labels, inputs))


def through_pickle(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_of_a_model_have_packed_copies_of_their_own(copied: Callable) -> None:
    var = accelerate(make_tiny_var())
    before = sample(var)
    other = copied(var)
    by_data(other.head)
    assert not torch.equal(sample(other), before)
    assert torch.equal(sample(var), before)


def kept_copies(var: VAR) -> int:
    return sum(len(packing._cache.get(id(parameter), ())) for parameter in var.parameters())


def test_copies_go_when_the_patch_changes() -> None:
    var = accelerate(make_tiny_var())
    for drop in (apply_patch, accelerate, release_cache, remove_patch, refresh):
        if drop is not refresh:
            accelerate(var)
        sample(var)
        assert drop is refresh or kept_copies(var) > 0
        drop(var)
        assert kept_copies(var) == 0


def test_refresh_takes_any_module_and_returns_none() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = linear(x, layer.weight, layer.bias)
        layer.weight.data.mul_(2)
        assert torch.equal(linear(x, layer.weight, layer.bias), before)  # as its documentation says
        assert actvar.refresh(nn.Sequential(layer)) is None
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("change", [by_load_state_dict, by_assignment, by_swapped_data, by_a_flat_buffer], ids=named)
def test_direct_calls_see_changes_that_are_counted_or_move_the_weight(change: Callable) -> None:
    fc1, fc2, conv = nn.Linear(64, 128), nn.Linear(128, 64), nn.Conv2d(16, 16, 3, padding=1)
    x, maps = torch.randn(5, 64), torch.randn(2, 16, 8, 8)
    every = torch.ones(5, 4, dtype=torch.bool)

    @torch.no_grad()
    def results() -> tuple[torch.Tensor, ...]:
        weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return (
            linear(x, fc1.weight, fc1.bias),
            expert_ffn(x, every, 4, *weights),
            conv3x3(maps, conv.weight, conv.bias),
        )

    before = results()
    for layer in (fc1, fc2, conv):
        change(layer)
    for found, old in zip(results(), before, strict=True):
        assert not torch.allclose(found, old)
    for layer in (fc1, fc2, conv):
        refresh(layer)
    with torch.no_grad():
        due = (fc1(x), fc2(nn.functional.gelu(fc1(x), approximate="tanh")), conv(maps))
    torch.testing.assert_close(results(), due, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8]))
def test_a_checksum_tells_every_change_of_one_number_and_of_the_order(data: st.DataObject, dtype: torch.dtype) -> None:
    length = data.draw(st.one_of(st.integers(1, 300), st.integers(130_000, 140_000)))
    tensor = torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(length)).to(dtype)
    (before,) = checksums([tensor])
    place = data.draw(st.integers(0, length - 1))
    changed = tensor.clone()
    changed[place] += 1
    assert checksums([changed]) != [before]
    other = data.draw(st.integers(0, length - 1))
    exchanged = tensor.clone()
    exchanged[[place, other]] = tensor[[other, place]]
    assert (checksums([exchanged]) == [before]) == torch.equal(exchanged, tensor)
    assert checksums([tensor, tensor.clone()]) == [before, before]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_checksum_does_not_depend_on_threads_and_gaps(threads: int) -> None:
    tensor = torch.randn(1000, 1111, generator=torch.Generator().manual_seed(0))
    (expected,) = checksums([tensor])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert checksums([tensor, tensor.t().contiguous().t()]) == [expected, expected]
    finally:
        torch.set_num_threads(before)
    assert checksums([tensor.t()]) != [expected]
    assert checksums([]) == []
    assert checksums([torch.empty(0)]) != [expected]
