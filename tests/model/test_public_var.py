"""The patch on instances of the public VAR class. Run with `ACTVAR_PUBLIC_VAR=DIR pytest -m public_var`, where DIR is
a clone of the public VAR repository."""

from __future__ import annotations

import io

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint, sample, sampled_tokens
from torch import nn

import actvar
from actvar import ActVARConfig, Execution, apply_patch, guided_rows, load_adapter, patched, remove_patch, save_adapter
from actvar.calibrate import calibrate
from actvar.flops import counted_flops, model_flops, total_flops

pytestmark = pytest.mark.public_var

RATES_OF_ONE = dict(token_rates=(1, 1), ffn_rate=1)
SIZES = dict(V=64, Cvae=8, ch=32, patch_nums=(1, 2, 3, 4, 6), num_classes=10, depth=2)


@pytest.fixture(params=[(False, True), (True, True), (False, False)], ids=["separate", "shared", "no QK norm"])
def pair(request, build_public) -> tuple[nn.Module, nn.Module]:
    """(public, own) with the same weights."""
    from support.golden import fill

    shared_aln, l2_norm = request.param
    kinds = dict(shared_aln=shared_aln, attn_l2_norm=l2_norm)
    _, own = actvar.models.build_vae_var(**SIZES, **kinds)
    public_vae, public = build_public(device="cpu", **SIZES, **kinds)
    fill(own.vae_proxy[0], 0)
    fill(own, 1)
    public.load_state_dict(own.state_dict())
    public_vae.load_state_dict(own.vae_proxy[0].state_dict())
    return public.eval(), own


def test_both_give_the_same_tokens_and_images(pair):
    public, own = pair
    assert torch.equal(sampled_tokens(public), sampled_tokens(own))
    torch.testing.assert_close(sample(public), sample(own), atol=1e-4, rtol=0)


@pytest.mark.parametrize("forced", [False, True], ids=["switched off", "forced"])
def test_rates_of_one_give_the_same_tokens(pair, forced):
    public, _ = pair
    dense = sampled_tokens(public)
    with patched(public, ActVARConfig(**RATES_OF_ONE, always_sparse=forced)):
        assert torch.equal(sampled_tokens(public), dense)


def test_removal_is_bit_exact(pair):
    public, _ = pair
    before, image = fingerprint(public), sample(public)
    apply_patch(public, ActVARConfig())
    assert not torch.equal(sample(public), image)
    remove_patch(public)
    assert_same_fingerprint(before, fingerprint(public))
    assert torch.equal(sample(public), image)


@pytest.mark.parametrize("config", [ActVARConfig(), ActVARConfig(kv="all", share_cfg_selection=True)])
def test_public_and_own_model_with_one_adapter_give_the_same_tokens(pair, config, tmp_path):
    public, own = pair
    save_adapter(apply_patch(own, config), tmp_path / "adapter.safetensors")
    load_adapter(apply_patch(public, config), tmp_path / "adapter.safetensors")
    assert torch.equal(sampled_tokens(public), sampled_tokens(own))
    torch.testing.assert_close(sample(public), sample(own), atol=1e-4, rtol=0)


def test_teacher_forcing_equals_our_model(pair):
    public, own = pair
    public.cond_drop_rate = 0
    labels, inputs = torch.tensor([1, 2]), torch.randn(2, own.L - 1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for var in (public, own):
            apply_patch(var, ActVARConfig())
        torch.testing.assert_close(public(labels, inputs), own(labels, inputs), atol=1e-4, rtol=0)


def test_an_own_sampling_loop_runs(pair):
    public, _ = pair
    apply_patch(public, ActVARConfig(share_cfg_selection=True))
    generator = torch.Generator().manual_seed(0)
    cond = public.class_emb(torch.tensor([1, 10]))
    modulation = public.shared_ada_lin(cond)
    for block in public.blocks:
        block.attn.kv_caching(True)
    with torch.no_grad(), guided_rows(public):
        for side in public.patch_nums:
            x = torch.randn(1, side * side, 128, generator=generator).repeat(2, 1, 1)
            for block in public.blocks:
                x = block(x=x, cond_BD=modulation, attn_bias=None)
            assert public.get_logits(x, cond).isfinite().all()


def test_a_patched_public_model_can_be_pickled(pair):
    public, _ = pair
    image = sample(apply_patch(public, ActVARConfig()))
    public.rng = None  # a torch.Generator cannot be pickled, patched or not
    buffer = io.BytesIO()
    torch.save(public, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    other.rng = torch.Generator()
    assert torch.equal(sample(other), image)


def test_flops_of_both_are_the_same(pair):
    public, own = pair
    for var in (public, own):
        apply_patch(var, ActVARConfig())
    counted = counted_flops(public, 2)
    assert counted == counted_flops(own, 2)
    assert total_flops(model_flops(public, 2)) == pytest.approx(total_flops(counted), rel=0.01)


@pytest.mark.parametrize("field", ["sampler", "decoder_dtype", "cuda_graph", "cudnn_benchmark"])
def test_what_needs_our_sampling_loop_is_refused(pair, field):
    public, _ = pair
    value = {"sampler": "fast", "decoder_dtype": "bfloat16", "cuda_graph": True, "cudnn_benchmark": True}[field]
    with pytest.raises(ValueError, match=rf"^{field}: {value!r} needs actvar\.models\.VAR"):
        apply_patch(public, execution=Execution(**{field: value}))
    assert type(public).__name__ == "VAR"


def test_calibration_of_both_is_the_same(pair):
    public, own = pair
    reports = [calibrate(var, ActVARConfig(num_experts=8), images=4) for var in (public, own)]
    assert reports[0].config == reports[1].config
    for left, right in zip(public.blocks, own.blocks, strict=True):
        assert torch.equal(left.actvar.changed_order, right.actvar.changed_order)
        torch.testing.assert_close(left.actvar.router.weight, right.actvar.router.weight, atol=1e-3, rtol=1e-3)
    assert torch.equal(sampled_tokens(public), sampled_tokens(own))


@pytest.mark.parametrize("labels", [10, torch.tensor([0, 10]), torch.tensor([0, 2**40])], ids=str)
def test_a_label_out_of_range_is_refused_before_a_patched_model_samples(pair, labels):
    public, _ = pair
    image = sample(apply_patch(public, ActVARConfig()))
    with pytest.raises(ValueError, match="labels from 0 to 9, or negative for unconditional images"):
        public.autoregressive_infer_cfg(2, labels)
    assert torch.equal(sample(public), image)


def test_negative_labels_in_a_tensor_are_unconditional_as_alone(pair):
    public, _ = pair
    apply_patch(public, ActVARConfig())
    alone = public.autoregressive_infer_cfg(2, -1, g_seed=0)
    assert torch.equal(public.autoregressive_infer_cfg(B=2, label_B=torch.tensor([-1, -3]), g_seed=0), alone)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_patched_model_frees_the_caches(pair, error):
    public, _ = pair
    image = sample(apply_patch(public, ActVARConfig()))

    def fail(*_):
        raise error("stop")

    handle = public.blocks[1].register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        sample(public)
    handle.remove()
    for block in public.blocks:
        assert not block.attn.caching
        assert block.attn.cached_k is None
        assert block.actvar.cache.state is None
    assert torch.equal(sample(public), image)
