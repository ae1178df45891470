"""What blocks keep from scale to scale: used again within a sample, and never beyond it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.helpers import sample

from actvar import ActVARConfig, apply_patch, release_cache
from actvar.families.var import VARFamily
from actvar.sparse.block_cache import SampleState
from actvar_kernels.backend import REFERENCE, Backend

SPARSE = ActVARConfig(token_rates=(0.75, 0.75), ffn_rate=0.5, num_experts=8)


@pytest.fixture(autouse=True)
def as_with_kernels(monkeypatch):
    """The references run where kernels would: over dense scales too, with what blocks keep for kernels."""
    monkeypatch.setattr("actvar.sparse.block.choose_fused", lambda _: Backend("cpu"))


@pytest.fixture
def block(tiny_var):
    return apply_patch(tiny_var, SPARSE).blocks[0]


def sampled_up_to_the_last_scale(block) -> torch.Tensor:
    """Run the block over its next to last scale with a cache of the scales before; the condition it was given."""
    cond = torch.randn(2, 128)
    block.attn.kv_caching(True)
    block.attn.cached_k = block.attn.cached_v = torch.randn(2, 2, 5, 64)
    with torch.no_grad():
        block(torch.randn(2, 9, 128), cond, None)
    return cond


def test_tokens_and_images_are_those_without_anything_kept(tiny_var, monkeypatch):
    apply_patch(tiny_var, SPARSE)
    images = sample(tiny_var)
    monkeypatch.setattr("actvar.sparse.block.choose_fused", lambda _: REFERENCE)
    assert torch.allclose(images, sample(tiny_var), atol=1e-5)


def test_adaln_is_computed_once_per_sample(tiny_var, monkeypatch):
    apply_patch(tiny_var, SPARSE)
    calls = []
    original = VARFamily.modulation
    monkeypatch.setattr(VARFamily, "modulation", lambda *args: calls.append(1) or original(*args))
    sample(tiny_var)
    assert len(calls) == len(tiny_var.blocks)


def test_a_compiled_block_computes_its_own_adaln(tiny_var, monkeypatch):
    block = apply_patch(tiny_var, SPARSE).blocks[0]
    asked = []
    monkeypatch.setattr(VARFamily, "modulations", lambda *_: asked.append(1))
    x, cond = torch.randn(2, 1, 128), torch.randn(2, 128)

    def outputs(run) -> torch.Tensor:
        with torch.no_grad(), tiny_var.actvar.sampling(tiny_var, in_place=False):
            block.attn.kv_caching(True)
            return run(x, cond, None)

    compiled = outputs(torch.compile(block, backend="eager", fullgraph=True))
    assert asked == []
    assert torch.allclose(compiled, outputs(block), atol=1e-5)
    assert asked == [1]


def test_the_next_scale_goes_on_only_with_the_same_condition_and_cache(block):
    cond = sampled_up_to_the_last_scale(block)
    state, last = block.actvar.cache.state, block.actvar.schedule[-1]
    with torch.no_grad():
        assert block.actvar.cache.continued(block, cond, last) is state
        assert block.actvar.cache.continued(block, cond.clone(), last) is not state
        block.attn.cached_k = block.attn.cached_k.clone()
        assert block.actvar.cache.continued(block, cond, last) is not state
    assert block.actvar.cache.continued(block, cond, last) is not state, "with gradients nothing is kept"


def test_weights_changed_between_two_samples_count(block):
    cond = sampled_up_to_the_last_scale(block)
    old = block.actvar.cache.state
    last = block.actvar.schedule[-1]
    with torch.no_grad():
        block.attn.q_bias.add_(1)
        block.attn.kv_caching(True)
        assert not torch.equal(block.actvar.cache.continued(block, cond, last).qkv_bias, old.qkv_bias)


def test_nothing_is_kept_after_the_last_scale(tiny_var):
    apply_patch(tiny_var, SPARSE)
    sample(tiny_var)
    assert all(block.actvar.cache.state is None and block.actvar.cache.version is None for block in tiny_var.blocks)


def test_copies_and_pickles_keep_nothing(block):
    sampled_up_to_the_last_scale(block)
    assert block.actvar.cache.state is not None
    for other in (copy.deepcopy(block.actvar.cache), pickle.loads(pickle.dumps(block.actvar.cache))):
        assert other.state is None
        assert other.version is None


def test_the_room_begins_with_the_cache_and_is_made_once(block):
    state = SampleState(block, torch.randn(2, 128))
    past = (torch.randn(2, 2, 5, 64), torch.randn(2, 2, 5, 64))
    kept = block.actvar.cache
    keys, values = state.kv_buffer_after(past, torch.randn(2, 2, 7, 64), capacity=12, cache=kept)
    assert keys.shape == values.shape == (2, 2, 12, 64)
    assert torch.equal(keys[:, :, :5], past[0])
    assert torch.equal(values[:, :, :5], past[1])
    assert state.kv_buffer_after(None, torch.randn(2, 2, 1, 64), capacity=12, cache=kept)[0] is keys


def rooms(var) -> list[int]:
    return [block.actvar.cache.kv_buffer[0].data_ptr() for block in var.blocks]


def test_the_next_sample_of_the_same_size_uses_the_same_room_until_it_is_released(tiny_var):
    apply_patch(tiny_var, SPARSE)
    images = sample(tiny_var)
    first = rooms(tiny_var)
    for block in tiny_var.blocks:
        for part in block.actvar.cache.kv_buffer:
            part.fill_(torch.nan)  # nothing of the last sample may be read
    assert torch.equal(sample(tiny_var), images)
    assert rooms(tiny_var) == first
    release_cache(tiny_var)
    assert all(block.actvar.cache.kv_buffer is None for block in tiny_var.blocks)
    assert torch.equal(sample(tiny_var), images)


def test_a_room_of_another_size_or_dtype_is_not_used(tiny_var):
    apply_patch(tiny_var, SPARSE)
    for change in (lambda: tiny_var.autoregressive_infer_cfg(3, 1, g_seed=0), lambda: sample(tiny_var.double())):
        images = sample(tiny_var)
        change()
        tiny_var.float()
        assert torch.equal(sample(tiny_var), images)
    with torch.inference_mode():
        assert torch.equal(sample(tiny_var), images)
    assert torch.equal(sample(tiny_var), images), "memory made in inference mode cannot be written to outside of it"


def test_a_loop_of_the_users_own_leaves_no_room_behind(block):
    cond = sampled_up_to_the_last_scale(block)
    with torch.no_grad():
        block(torch.randn(2, 25, 128), cond, None)
    assert block.actvar.cache.kv_buffer is None


def test_only_patched_models_have_a_cache_to_release(tiny_var):
    with pytest.raises(ValueError, match="unpatched"):
        release_cache(tiny_var)


def test_keeping_outside_sampling_keeps_nothing(block):
    scale = block.actvar.schedule[-2]
    with torch.no_grad():
        block.actvar.cache.keep(block, SampleState(block, torch.randn(2, 128)), scale)
    assert block.actvar.cache.state is None
