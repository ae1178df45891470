from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint, sample, sampled_tokens
from torch import nn

import actvar
from actvar import ActVARConfig, Execution, apply_patch, guided_rows, patched, record, remove_patch

SPARSE = ActVARConfig()
ONES = ActVARConfig(token_rates=(1, 1), ffn_rate=1)
FORCED = ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True)


def test_removal_is_bit_exact(tiny_var):
    before, image = fingerprint(tiny_var), sample(tiny_var)
    state = {name: tensor.clone() for name, tensor in tiny_var.state_dict().items()}
    apply_patch(tiny_var, SPARSE)
    assert not torch.equal(sample(tiny_var), image)
    assert remove_patch(tiny_var) is tiny_var
    assert_same_fingerprint(before, fingerprint(tiny_var))
    assert torch.equal(sample(tiny_var), image)
    after = tiny_var.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_state_dict_of_a_patched_model_is_the_original_and_loads(tiny_var):
    before = tiny_var.state_dict()
    apply_patch(tiny_var, SPARSE)
    after = tiny_var.state_dict()
    assert list(before) == list(after)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    selector = tiny_var.blocks[0].actvar.selector.weight.clone()
    tiny_var.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    assert tiny_var.head.weight.abs().max() == 0
    assert torch.equal(tiny_var.blocks[0].actvar.selector.weight, selector)


@pytest.mark.parametrize("config", [ONES, FORCED], ids=["switched off", "forced"])
@pytest.mark.parametrize("kv", ["compact", "all"])
def test_rates_of_one_give_the_dense_tokens(make_var, config, kv):
    var = make_var(shared_aln=kv == "all")
    dense = sampled_tokens(var)
    with patched(var, ActVARConfig(**(vars(config) | {"kv": kv}))):
        assert torch.equal(sampled_tokens(var), dense)


@pytest.mark.parametrize("config", [ONES, FORCED], ids=["switched off", "forced"])
def test_rates_of_one_give_the_dense_teacher_forced_logits(tiny_var, config):
    labels, inputs = torch.tensor([3, 4]), torch.randn(2, tiny_var.L - 1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = tiny_var(labels, inputs)
        with patched(tiny_var, config):
            torch.testing.assert_close(tiny_var(labels, inputs), dense, atol=2e-5, rtol=0)


def test_teacher_forcing_gives_the_logits_of_sampling(tiny_var):
    """Scale by scale with the cache, on the inputs that the sampled tokens lead to."""
    apply_patch(tiny_var, SPARSE)
    labels, inputs = torch.tensor([3, 4]), torch.randn(2, tiny_var.L - 1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_var(labels, inputs)
        cond = tiny_var.class_emb(labels)
        embedded = torch.cat((cond.unsqueeze(1) + tiny_var.pos_start, tiny_var.word_embed(inputs)), dim=1)
        embedded = embedded + tiny_var.lvl_embed(tiny_var.lvl_1L) + tiny_var.pos_1LC
        assert_cached_loop_matches(tiny_var, embedded, cond, expected)


def assert_cached_loop_matches(var, embedded, cond, expected):
    for block in var.blocks:
        block.attn.kv_caching(True)
    start = 0
    for side in var.patch_nums:
        x = embedded[:, start : start + side * side]
        for block in var.blocks:
            x = block(x=x, cond_BD=cond, attn_bias=None)
        torch.testing.assert_close(var.get_logits(x, cond), expected[:, start : start + side * side], atol=5e-5, rtol=0)
        start += side * side


def test_patching_twice_patches_afresh(tiny_var):
    apply_patch(tiny_var, SPARSE)
    once = type(tiny_var), type(tiny_var.blocks[0])
    apply_patch(tiny_var, ActVARConfig(num_experts=8))
    assert (type(tiny_var), type(tiny_var.blocks[0])) == once
    assert tiny_var.blocks[0].actvar.router.weight.shape[0] == 8
    remove_patch(tiny_var)
    assert type(tiny_var) is actvar.models.VAR


def test_untrained_gates_are_the_same_in_every_run_and_announced_once(tiny_var, make_var, caplog):
    with caplog.at_level(logging.WARNING):
        apply_patch(tiny_var, SPARSE)
    assert [r.message for r in caplog.records if "untrained" in r.message] == [caplog.records[0].message]
    other = apply_patch(make_var(), SPARSE)
    weights = [v.blocks[1].actvar.router.weight for v in (tiny_var, other)]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0][:1], tiny_var.blocks[0].actvar.router.weight[:1])


def test_removing_from_an_unpatched_model_changes_nothing(tiny_var):
    before = fingerprint(tiny_var)
    remove_patch(tiny_var)
    assert_same_fingerprint(before, fingerprint(tiny_var))


@pytest.mark.parametrize("function", [apply_patch, remove_patch])
def test_an_unknown_model_is_refused_with_the_list_of_supported_ones(function):
    with pytest.raises(TypeError, match=r"Linear cannot be patched. Supported: VAR .*expected an attribute 'blocks'"):
        function(nn.Linear(2, 2))


def test_a_vae_is_refused(tiny_var):
    with pytest.raises(TypeError, match="VQVAE cannot be patched"):
        apply_patch(tiny_var.vae_proxy[0], SPARSE)


def test_a_model_with_a_foreign_block_is_refused_and_unchanged(tiny_var):
    tiny_var.blocks[1].ffn = nn.Identity()
    before = fingerprint(tiny_var)
    with pytest.raises(TypeError, match=r"blocks\[1\].ffn.fc1"):
        apply_patch(tiny_var, SPARSE)
    assert_same_fingerprint(before, fingerprint(tiny_var))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ActVARConfig(num_experts=24), "divisor of the FFN's hidden size 512, got 24"),
        (ActVARConfig(scales=(-2, 7)), "the model has 4 scales"),
    ],
)
def test_a_configuration_that_does_not_fit_leaves_the_model_as_it_was(tiny_var, config, message):
    before = fingerprint(tiny_var)
    with pytest.raises(ValueError, match=message):
        apply_patch(tiny_var, config)
    assert_same_fingerprint(before, fingerprint(tiny_var))


def test_a_configuration_of_another_type_is_refused(tiny_var):
    with pytest.raises(TypeError, match="expected an ActVARConfig, got dict"):
        apply_patch(tiny_var, {"num_experts": 16})


def test_the_context_removes_the_patch_after_an_error(tiny_var):
    with pytest.raises(RuntimeError, match="stop"), patched(tiny_var, SPARSE):
        raise RuntimeError("stop")
    assert type(tiny_var) is actvar.models.VAR


def test_a_patched_model_can_be_copied_and_pickled(tiny_var):
    image = sample(apply_patch(tiny_var, SPARSE))
    buffer = io.BytesIO()
    torch.save(tiny_var, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(tiny_var), torch.load(buffer, weights_only=False)):
        assert torch.equal(sample(other), image)
        assert other.blocks[0].actvar.shared is other.actvar
        assert other.actvar is not tiny_var.actvar
        remove_patch(other)
        assert type(other) is actvar.models.VAR
    assert torch.equal(sample(tiny_var), image)


def test_two_patched_models_do_not_share_their_configuration(tiny_var, make_var):
    other = make_var()
    image = sample(apply_patch(tiny_var, SPARSE))
    apply_patch(other, ActVARConfig(token_rates=(0.25, 0.25)))
    assert torch.equal(sample(tiny_var), image)
    assert tiny_var.blocks[0].actvar.shared.config == SPARSE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_patched_model_follows_to(tiny_var, dtype):
    apply_patch(tiny_var, SPARSE).to(dtype)
    assert tiny_var.blocks[0].actvar.selector.weight.dtype == dtype
    image = sample(tiny_var)
    assert image.isfinite().all()
    assert remove_patch(tiny_var).head.weight.dtype == dtype


def test_low_precision_is_close_to_float32_at_fixed_tokens(make_var):
    """At equal inputs; the selected tokens may differ where scores nearly tie, so selection is off."""
    config = ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True)
    labels, inputs = torch.tensor([3, 4]), torch.randn(2, 38, 8, generator=torch.Generator().manual_seed(0))
    exact = make_var().double()
    with torch.no_grad():
        reference = exact(labels, inputs.double())
        for dtype in (torch.float16, torch.bfloat16):
            var = make_var().to(dtype)
            dense_error = (var(labels, inputs) - reference).abs().max()
            error = (apply_patch(var, config)(labels, inputs) - reference).abs().max()
            assert error <= 1.5 * dense_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_and_scores_stay_in_float32(tiny_var, dtype):
    apply_patch(tiny_var, SPARSE)
    with torch.autocast("cpu", dtype), record(tiny_var) as records:
        image = sample(tiny_var)
    assert image.isfinite().all()
    assert {r.scores.dtype for r in records} == {r.logits.dtype for r in records} == {torch.float32}


def test_guidance_rows_choose_alone_unless_shared(tiny_var):
    for share in (False, True):
        with patched(tiny_var, ActVARConfig(share_cfg_selection=share)), record(tiny_var) as records:
            sample(tiny_var)
        same = [torch.equal(*r.index.chunk(2)) for r in records]
        assert all(same) if share else not all(same)


def test_an_own_loop_says_itself_that_rows_are_guided(tiny_var):
    apply_patch(tiny_var, ActVARConfig(share_cfg_selection=True))
    assert not tiny_var.actvar.rows_are_guided
    with guided_rows(tiny_var):
        assert tiny_var.actvar.rows_are_guided
    assert not tiny_var.actvar.rows_are_guided


def test_records_show_each_active_scale_of_each_block(tiny_var):
    apply_patch(tiny_var, SPARSE)
    with record(tiny_var) as records:
        sample(tiny_var)
    assert [(r.scale.tokens, r.block) for r in records] == [(9, 0), (9, 1), (25, 0), (25, 1)]
    for r in records:
        assert r.index.shape == (4, r.scale.keep)
        assert (r.mask.sum(-1) == 12).all()
        assert (r.index.diff(dim=1) > 0).all()
    assert tiny_var.actvar.records is None


def test_recording_an_unpatched_model_is_refused(tiny_var):
    with pytest.raises(ValueError, match=r"patched by actvar.apply_patch"), record(tiny_var):
        pass


def test_a_token_count_that_is_no_scale_is_refused(tiny_var):
    apply_patch(tiny_var, SPARSE)
    tiny_var.blocks[0].attn.kv_caching(True)
    with pytest.raises(ValueError, match="got 7 tokens after 0"):
        tiny_var.blocks[0](torch.zeros(2, 7, 128), torch.zeros(2, 128), None)


@pytest.mark.parametrize("layout", ["using_flash", "using_xform"])
def test_caches_of_flash_attention_and_xformers_are_read_and_written_in_their_layout(tiny_var, layout):
    """Those layouts keep `[R, tokens, H, d]`; the result is that of the SDPA layout."""
    dtype = torch.bfloat16 if layout == "using_flash" else torch.float32
    block = apply_patch(tiny_var, SPARSE).blocks[0].to(dtype)
    x, cond = torch.randn(2, 9, 128, dtype=dtype), torch.randn(2, 128, dtype=dtype)
    past = torch.randn(2, 2, 5, 64, dtype=dtype)
    block.attn.kv_caching(True)
    block.attn.cached_k = block.attn.cached_v = past
    expected = block(x, cond)
    keys = block.attn.cached_k
    assert keys.shape == (2, 2, 5 + 7, 64)

    setattr(block.attn, layout, True)
    block.attn.kv_caching(True)
    block.attn.cached_k = block.attn.cached_v = past.transpose(1, 2).contiguous()
    assert torch.equal(block(x, cond), expected)
    assert torch.equal(block.attn.cached_k.transpose(1, 2), keys)


def test_the_last_scale_leaves_the_cache_alone(tiny_var):
    apply_patch(tiny_var, SPARSE)
    lengths = []
    attn = tiny_var.blocks[0].attn
    tiny_var.blocks[0].register_forward_hook(lambda *_: lengths.append(attn.cached_k.shape[2]))
    sample(tiny_var)
    assert lengths == [1, 5, 12, 12]
    assert attn.cached_k is None


@pytest.mark.parametrize("compiled", ["model", pytest.param("blocks", marks=pytest.mark.slow)])
def test_compiled_models_sample_the_same_and_can_be_patched(tiny_var, compiled):
    expected = sample(apply_patch(tiny_var, SPARSE))
    remove_patch(tiny_var)
    if compiled == "model":
        wrapper = torch.compile(tiny_var, backend="eager")
        assert apply_patch(wrapper, SPARSE) is wrapper
        labels, inputs = torch.tensor([1, 2]), torch.randn(2, tiny_var.L - 1, 8)
        with torch.no_grad():
            torch.testing.assert_close(wrapper(labels, inputs), tiny_var(labels, inputs))
    else:
        for block in tiny_var.blocks:
            block.compile(backend="eager")
        apply_patch(tiny_var, SPARSE)
    torch.testing.assert_close(sample(tiny_var), expected)
    remove_patch(tiny_var)
    assert type(tiny_var) is actvar.models.VAR


def test_blocks_inside_a_compile_wrapper_are_patched(tiny_var):
    expected = sample(apply_patch(tiny_var, SPARSE))
    remove_patch(tiny_var)
    for index, block in enumerate(tiny_var.blocks):
        tiny_var.blocks[index] = torch.compile(block, backend="eager")
    with patched(tiny_var, SPARSE), record(tiny_var) as records:
        torch.testing.assert_close(sample(tiny_var), expected)
    assert len(records) == 4


def test_a_block_with_a_forward_of_its_own_is_refused_and_unchanged(tiny_var):
    tiny_var.blocks[1].forward = tiny_var.blocks[1].forward
    with pytest.raises(ValueError, match=r"blocks\[1\] with its class's forward"):
        apply_patch(tiny_var, SPARSE)
    assert type(tiny_var) is actvar.models.VAR


def test_a_copy_of_a_compiled_patched_model_has_weights_of_its_own(tiny_var):
    for block in tiny_var.blocks:
        block.compile(backend="eager")
    image = sample(apply_patch(tiny_var, SPARSE))
    other = copy.deepcopy(tiny_var)
    tiny_var.head.weight.data.zero_()
    for block in tiny_var.blocks:
        block.ffn.fc1.weight.data.zero_()
    torch.testing.assert_close(sample(other), image)


def test_the_context_puts_an_earlier_patch_back(tiny_var):
    image = sample(apply_patch(tiny_var, SPARSE))
    gates = [block.actvar for block in tiny_var.blocks]
    with patched(tiny_var, ActVARConfig(token_rates=(0.25, 0.25))):
        assert not torch.equal(sample(tiny_var), image)
    assert [block.actvar for block in tiny_var.blocks] == gates
    assert torch.equal(sample(tiny_var), image)


def test_patching_is_independent_of_the_default_device(tiny_var):
    expected = apply_patch(tiny_var, SPARSE).blocks[0].actvar.router.weight.clone()
    with torch.device("meta"):
        apply_patch(tiny_var, SPARSE)
    assert torch.equal(tiny_var.blocks[0].actvar.router.weight, expected)


def test_another_layer_norm_epsilon_is_refused(tiny_var):
    tiny_var.blocks[0].ln_wo_grad.eps = 1e-5
    with pytest.raises(TypeError, match="eps of 1e-06, got 1e-05"):
        apply_patch(tiny_var, SPARSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_decoder_in_another_dtype_changes_pixels_a_little_and_nothing_else(tiny_var, dtype):
    apply_patch(tiny_var, ActVARConfig(num_experts=8))
    exact = sample(tiny_var)
    apply_patch(tiny_var, ActVARConfig(num_experts=8), Execution(decoder_dtype=dtype))
    images = sample(tiny_var)
    assert images.dtype == exact.dtype == torch.float32
    assert not torch.equal(images, exact)
    assert (images - exact).abs().max() < 0.05
    remove_patch(tiny_var)
    assert not torch.is_autocast_enabled("cpu")
