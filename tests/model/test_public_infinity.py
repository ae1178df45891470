"""The patch on instances of the public Infinity class. Run with `ACTVAR_PUBLIC_INFINITY=DIR pytest -m public_infinity`,
where DIR is a clone of the public Infinity repository."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint
from support.infinity import tiny_text
from support.public_infinity import SIZE, public_and_own, round_nowhere, sample_public
from torch import Tensor, nn

from actvar import ActVARConfig, Execution, Texts, apply_patch, load_adapter, patched, remove_patch, save_adapter
from actvar.calibrate import calibrate
from actvar.calibrate.goal import Goal
from actvar.calibrate.plan import plan
from actvar.distill import Stage1, Stage2
from actvar.distill.data import sampled_source
from actvar.models import Infinity
from actvar.models.infinity import layers, scale_schedule
from benchmarks.public_infinity import import_infinity

pytestmark = pytest.mark.public_infinity

LENGTHS = [3, 5]
SCHEDULE = scale_schedule(size=SIZE)
ONES = dict(token_rates=(1, 1), ffn_rate=1)


@pytest.fixture(scope="session")
def module(public_infinity_folder) -> ModuleType:
    imported = import_infinity(public_infinity_folder)
    round_nowhere()
    return imported


@pytest.fixture(params=[False, True], ids=["one place a token", "patchified"])
def pair(
    request: pytest.FixtureRequest, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, Infinity]:
    """Return (public, own) with the same weights; neither rounds in cross-attention."""
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    public, own = public_and_own(module, request.param)
    own.decode = lambda features: features
    return public, own


def draw_public(pair: tuple[nn.Module, Infinity], **changes) -> list[Tensor]:
    return [bits.to(torch.uint8) for bits in sample_public(*pair, *tiny_text(LENGTHS), SCHEDULE, **changes)]


def draw_own(own: Infinity, **changes) -> list[Tensor]:
    return own.sample(*tiny_text(LENGTHS), SCHEDULE, g_seed=1, tau=1.0, **changes, return_bits=True)[1]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("insertion", [(0,), (-2,)], ids=str)
def test_both_draw_the_same_bits(pair, insertion):
    assert same(draw_public(pair, cfg_insertion_layer=list(insertion)), draw_own(pair[1], insertion=insertion))


@pytest.mark.parametrize("insertion", [[0], [-2]], ids=str)
@pytest.mark.parametrize("forced", [False, True], ids=["switched off", "forced"])
def test_rates_of_one_draw_the_same_bits(pair, forced, insertion):
    dense = draw_public(pair, cfg_insertion_layer=insertion)
    with patched(pair[0], ActVARConfig(**ONES, always_sparse=forced)):
        assert same(draw_public(pair, cfg_insertion_layer=insertion), dense)


@pytest.mark.parametrize(
    "config", [{}, dict(kv="all"), dict(guidance_until=-2), dict(scales=(-4, -1), token_rates=(0.5, 0.25))], ids=str
)
def test_both_with_one_patch_draw_the_same_bits(pair, config):
    own = pair[1]
    dense = draw_own(own)
    for model in pair:
        apply_patch(model, ActVARConfig(**config))
    bits = draw_own(own)
    assert not same(bits, dense)
    assert same(draw_public(pair), bits)


def test_removal_is_bit_exact(pair):
    public, _ = pair
    before, dense = fingerprint(public), draw_public(pair)
    apply_patch(public, ActVARConfig())
    draw_public(pair)
    remove_patch(public)
    assert_same_fingerprint(before, fingerprint(public))
    assert same(draw_public(pair), dense)


@torch.no_grad()
def test_both_compute_the_same_under_teacher_forcing(pair):
    public, own = pair
    text, lengths = tiny_text(LENGTHS)
    inputs = torch.randn(2, sum(h * w for _, h, w in SCHEDULE) - 1, own.token_bits)
    public.cond_drop_rate = 0.0
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for config in (None, ActVARConfig()):
        if config is not None:
            apply_patch(public, config), apply_patch(own, config)
        ours = own(text, lengths, inputs, SCHEDULE)
        theirs = public((text.clone(), lengths, ends, max(lengths)), inputs, SCHEDULE)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5 * float(ours.abs().max()))


def test_guidance_after_a_block_is_refused_where_no_rows_are_left_to_mix(pair):
    apply_patch(pair[0], ActVARConfig(guidance_until=-1))
    with pytest.raises(ValueError, match=r"cfg_insertion_layer: expected \[0\]"):
        draw_public(pair, cfg_insertion_layer=[-2])


def test_a_hook_on_attention_is_honoured_or_refused(pair):
    public, _ = pair
    dense, calls = draw_public(pair), []
    public.unregistered_blocks[1].sa.register_forward_hook(lambda *_: calls.append(1))
    with patched(public, ActVARConfig(**ONES)):
        assert same(draw_public(pair), dense)
    assert len(calls) == len(SCHEDULE)
    apply_patch(public, ActVARConfig())
    with pytest.raises(TypeError, match="sa: expected plain layers, which attention of some tokens can read"):
        draw_public(pair)


def test_a_hook_on_the_norm_before_cross_attention_is_honoured_or_refused(pair):
    public, _ = pair
    before = draw_public(pair)
    public.unregistered_blocks[1].ca_norm.register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    dense = draw_public(pair)
    assert not same(dense, before)
    with patched(public, ActVARConfig(**ONES)):
        assert same(draw_public(pair), dense)
    for config in (ActVARConfig(), ActVARConfig(token_rates=(1, 1), ffn_rate=0.5, static_experts=True)):
        with pytest.raises(TypeError, match=r"blocks\[1\].ca_norm: expected plain layers"):
            apply_patch(public, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fused_norm=False), "Infinity of the public code: expected .*fused_norm=True"),
        (dict(shared_aln=False), "Infinity of the public code: expected .*ada_gss"),
        (dict(swiglu=True), r"blocks\[0\].ffn: .* got one that is of .*FFNSwiGLU"),
    ],
    ids=["norm", "AdaLN", "FFN"],
)
def test_what_is_unlike_the_published_models_is_refused(module, changes, message):
    with pytest.raises(TypeError, match=message):
        apply_patch(public_and_own(module, **changes)[0])


@pytest.mark.parametrize("lora", [None, 3], ids=["whole", "factors"])
def test_both_are_trained_alike(pair, lora, tmp_path):
    """Losses and gradients are those of our class, to rounding, and one adapter serves both."""
    texts = Texts(tiny_text(LENGTHS)[0].split(LENGTHS), SCHEDULE)
    inputs = torch.randn(2, sum(h * w for _, h, w in SCHEDULE) - 1, pair[1].token_bits)
    bits = torch.randint(2, (2, inputs.shape[1] + 1, pair[1].token_bits))
    found = []
    for model in pair:
        apply_patch(model, ActVARConfig())
        stage = Stage2(model, ("cls", "block", "output", "guided"), cfg=3.0, lora=lora)
        if stage.low_rank is not None:
            torch.manual_seed(0)
            for factor in stage.low_rank.B:
                factor.data.normal_(0, 0.1)
        losses = stage(texts, inputs, bits)
        losses["loss"].backward()
        stage.finish()
        save_adapter(model, tmp_path / f"{len(found)}.safetensors")
        found.append((losses, [p.grad for p in stage.parameters() if p.requires_grad]))
    (public, own), (public_gradients, own_gradients) = zip(*found, strict=True)
    for name, loss in own.items():
        torch.testing.assert_close(public[name], loss, rtol=1e-4, atol=1e-5)
    for theirs, ours in zip(public_gradients, own_gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))
    load_adapter(pair[1], tmp_path / "0.safetensors")
    gates = Stage1(apply_patch(pair[0], ActVARConfig()))
    assert gates(texts, inputs, bits)["loss"].isfinite()


def test_what_needs_a_tokenizer_is_refused_by_name(pair):
    texts = Texts(tiny_text(LENGTHS)[0].split(LENGTHS), SCHEDULE)
    with pytest.raises(TypeError, match=r"holds its tokenizer; load the checkpoint with actvar\.load_infinity"):
        sampled_source(pair[0], 2, 0, texts).tokens_of(0, 2)
    with pytest.raises(TypeError, match="such as VAR, got Infinity; it draws from texts"):
        sampled_source(pair[0], 2, 0)


def test_in_training_teacher_and_student_leave_out_the_same_texts(pair):
    public, _ = pair
    texts = Texts(tiny_text(LENGTHS)[0].split(LENGTHS), SCHEDULE)
    inputs = torch.randn(2, sum(h * w for _, h, w in SCHEDULE) - 1, pair[1].token_bits)
    bits = torch.zeros(2, inputs.shape[1] + 1, pair[1].token_bits)
    stage = Stage2(apply_patch(public, ActVARConfig(**ONES))).train()
    public.cond_drop_rate = 0.5
    for seed in range(4):
        torch.manual_seed(seed)
        assert stage(texts, inputs, bits)["output"].item() == pytest.approx(0, abs=1e-6)
    assert public.cond_drop_rate == 0.5


def test_a_graph_needs_the_loop_of_our_class(pair):
    with pytest.raises(ValueError, match=r"cuda_graph: True needs actvar\.models\.VAR or Infinity"):
        apply_patch(pair[0], ActVARConfig(**ONES), Execution(cuda_graph=True))


def test_it_is_calibrated_as_ours_is_and_the_patch_comes_off_bit_for_bit(pair):
    public, own = pair
    features, lengths = tiny_text(LENGTHS)
    texts = Texts(features.split(lengths), SCHEDULE)
    before = fingerprint(public)
    config = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)
    reports = [calibrate(model, config, images=4, texts=texts) for model in pair]
    assert reports[0] == reports[1]
    for ours, theirs in zip(own.unregistered_blocks, public.unregistered_blocks, strict=True):
        assert torch.equal(ours.actvar.hidden_order, theirs.actvar.hidden_order)
        assert same(list(ours.actvar.parameters()), list(theirs.actvar.parameters()))
    remove_patch(public)
    assert_same_fingerprint(before, fingerprint(public))


def test_it_is_planned_by_ours_which_a_tokenizer_is_given_for(pair, tmp_path):
    public, own = pair
    tokenizer, goal, levers = own.vae_proxy[0], Goal(kl=0.5), ["tokens", "experts", "guidance"]
    features, lengths = tiny_text(LENGTHS)
    texts = Texts(features.split(lengths), SCHEDULE[:4])
    before = fingerprint(public)
    with pytest.raises(ValueError, match="tokenizer: expected that of the model, which holds none, got NoneType"):
        plan(public, goal, levers, texts=texts)
    with pytest.raises(ValueError, match="tokenizer: expected None, since the model has its own"):
        plan(own, goal, levers, texts=texts, tokenizer=tokenizer)
    with pytest.raises(TypeError, match=r"tokenizer: expected an actvar\.models\.InfinityTokenizer, got Linear"):
        plan(public, goal, levers, texts=texts, tokenizer=nn.Linear(1, 1))
    assert_same_fingerprint(before, fingerprint(public))
    numbers = dict(images=4, batch=1, num_experts=8, repeats=1)
    report = plan(public, goal, levers, texts=texts, tokenizer=tokenizer, **numbers)
    assert report.is_met
    assert public.actvar.config == report.chosen.config
    assert public.actvar.execution == report.chosen.execution
    save_adapter(public, tmp_path / "plan.safetensors")
    load_adapter(own, tmp_path / "plan.safetensors")
    for ours, theirs in zip(own.unregistered_blocks, public.unregistered_blocks, strict=True):
        assert torch.equal(ours.actvar.hidden_order, theirs.actvar.hidden_order)
        assert same(list(ours.actvar.parameters()), list(theirs.actvar.parameters()))
    remove_patch(public)
    assert_same_fingerprint(before, fingerprint(public))
