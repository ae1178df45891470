"""Infinity's sampling and teacher forcing on tiny models: what belongs together agrees, wrong arguments are named."""

from __future__ import annotations

import copy

import pytest
import torch
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from actvar.models import Infinity, build_infinity
from actvar.models.infinity import layers

LENGTHS = [3, 5]
TALL = [(1, 1, 1), (1, 3, 2)]


@pytest.fixture(params=[False, True], ids=["one place a token", "patchified"])
def infinity(request: pytest.FixtureRequest) -> Infinity:
    return tiny_infinity(request.param)[1]


@pytest.fixture
def plain() -> Infinity:
    """Return a model that draws bits and leaves out the decoder."""
    infinity = tiny_infinity()[1]
    infinity.decode = lambda features: features
    return infinity


def drawn(infinity: Infinity, lengths: list[int] = LENGTHS, text: Tensor | None = None, **changes) -> list[Tensor]:
    """Return the images and the bits of every scale."""
    arguments = {"g_seed": 1, "tau": 1.0, **changes}
    text = tiny_text(lengths)[0] if text is None else text
    image, bits = infinity.sample(text, lengths, TINY_SCHEDULE, **arguments, return_bits=True)
    return [image, *bits]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_images_and_bits_have_the_sizes_of_the_schedule(infinity: Infinity) -> None:
    image, *bits = drawn(infinity)
    factor = 2 if infinity.spatial_patchify else 1
    assert [tuple(b.shape) for b in bits] == [(2, factor * h, factor * w, 4) for _, h, w in TINY_SCHEDULE]
    assert {b.dtype for b in bits} == {torch.uint8}
    assert {int(value) for b in bits for value in b.unique()} == {0, 1}
    assert (image.shape, image.dtype) == ((2, 3, 48, 64), torch.float32)
    assert 0 <= image.min() < image.max() <= 1
    assert torch.equal(image, drawn(infinity)[0])
    assert torch.equal(image, infinity.sample(*tiny_text(LENGTHS), TINY_SCHEDULE, g_seed=1, tau=1.0))
    decoded = infinity.vae_proxy[0].decode_bits(bits)
    torch.testing.assert_close(image, (decoded + 1) / 2, rtol=0, atol=1e-5)


@torch.no_grad()
def test_teacher_forcing_gives_the_logits_of_sampling(infinity: Infinity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "rounded", lambda x: x)  # a sum in another order may round to the other side
    logits: list[Tensor] = []
    hook = infinity.head.register_forward_hook(lambda module, args, output: logits.append(output))
    _, *bits = drawn(infinity, cfg=1.0)
    hook.remove()
    forced = infinity(*tiny_text(LENGTHS), infinity.teacher_input(bits), TINY_SCHEDULE)
    sampled = torch.cat([of_scale[:2] for of_scale in logits], dim=1)
    torch.testing.assert_close(forced, sampled, rtol=0, atol=2e-5 * float(forced.abs().max()))


@torch.no_grad()
def test_teacher_forcing_without_rounding_gives_the_logits_of_float64(
    infinity: Infinity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    inputs = torch.randn(2, 16, infinity.token_bits, generator=torch.Generator().manual_seed(0))
    text, lengths = tiny_text(LENGTHS)
    single = infinity(text, lengths, inputs, TINY_SCHEDULE)
    double = copy.deepcopy(infinity).double()(text.double(), lengths, inputs.double(), TINY_SCHEDULE)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5 * float(double.abs().max()))


@pytest.mark.parametrize("lengths", [[5, 3], [4, 4], [1, 12]], ids=str)
def test_a_text_draws_the_same_whatever_else_is_in_the_batch(
    plain: Infinity, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    text, _ = tiny_text(lengths)
    both = drawn(plain, lengths, text, g_seed=[7, 8])
    for i, part in enumerate(text.split(lengths)):
        alone = drawn(plain, [lengths[i]], part, g_seed=7 + i)
        assert same([b[i : i + 1] for b in both], alone)


def test_guidance_and_its_place_change_what_is_drawn_and_none_is_no_guidance(plain: Infinity) -> None:
    ways = [dict(cfg=1.0), dict(cfg=3.0), dict(cfg=3.0, insertion=(-1,)), dict(cfg=3.0, insertion=(-3, 0))]
    results = [drawn(plain, **way) for way in ways]
    assert not any(same(a, b) for i, a in enumerate(results) for b in results[:i])
    assert same(results[0], drawn(plain, cfg=[1, 1, 1], insertion=()))
    assert same(results[1], drawn(plain, cfg=(3.0, 3.0, 3.0)))
    first_alone = drawn(plain, cfg=[3.0, 1.0, 1.0])
    assert torch.equal(first_alone[1], results[1][1])
    assert not same(first_alone, results[1])


def test_the_unconditional_features_as_negative_prompt_change_nothing(plain: Infinity) -> None:
    negative = plain.unconditional(LENGTHS).detach(), LENGTHS
    assert same(drawn(plain, negative=negative), drawn(plain))
    other = drawn(plain, negative=tiny_text([2, 9], seed=5))
    assert not same(other, drawn(plain))
    assert same(drawn(plain, negative=tiny_text([2, 9], seed=5), cfg=1.0), drawn(plain, cfg=1.0))


def test_filters_and_temperature_make_the_likelier_bit_certain(plain: Infinity) -> None:
    greedy = drawn(plain, top_k=1)
    assert same(greedy, drawn(plain, top_k=1, g_seed=2))
    assert same(greedy, drawn(plain, top_p=1e-6, g_seed=3))
    assert same(greedy, drawn(plain, tau=1e-6, g_seed=4))
    assert not same(greedy, drawn(plain, top_k=0, top_p=0.0))
    assert same(drawn(plain, top_k=2), drawn(plain, top_k=900))


def test_sampling_leaves_no_cache_behind_and_the_last_scale_none_at_all(plain: Infinity) -> None:
    kept: list[object] = []
    last = plain.unregistered_blocks[-1]
    hook = last.register_forward_hook(lambda module, args, output: kept.append(last.sa.cached_k))
    drawn(plain)
    hook.remove()
    assert [None if k is None else k.shape[2] for k in kept] == [1, 5, None]
    for block in plain.unregistered_blocks:
        caches = (block.sa.caching, block.sa.cached_k, block.sa.cached_v, block.ca.caching, block.ca.cached_kv)
        assert caches == (False, None, None, False, None)


def test_an_error_in_a_sample_leaves_no_cache_behind(plain: Infinity) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    plain.head.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        drawn(plain)
    assert not any(block.sa.caching or block.ca.caching for block in plain.unregistered_blocks)


def test_gradients_reach_every_parameter_and_the_text(infinity: Infinity) -> None:
    text, lengths = tiny_text(LENGTHS)
    text.requires_grad_(True)
    infinity.train().cond_drop_rate = 0.0
    inputs = torch.randn(2, 16, infinity.token_bits)
    infinity(text, lengths, inputs, TINY_SCHEDULE).square().mean().backward()
    without = {name for name, p in infinity.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"cfg_uncond"}
    assert text.grad.abs().sum(1).min() > 0
    infinity.cond_drop_rate = 1.0
    infinity(text, lengths, inputs, TINY_SCHEDULE).square().mean().backward()
    used = infinity.cfg_uncond.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 5 + [False] * 7


@torch.no_grad()
def test_texts_are_dropped_in_train_mode_alone(plain: Infinity) -> None:
    text, lengths = tiny_text(LENGTHS)
    inputs = torch.randn(2, 16, plain.token_bits)
    plain.cond_drop_rate = 1.0
    kept = plain(text, lengths, inputs, TINY_SCHEDULE)
    unconditional = plain(plain.unconditional(lengths), lengths, inputs, TINY_SCHEDULE)
    assert torch.equal(plain.train()(text, lengths, inputs, TINY_SCHEDULE), unconditional)
    assert not torch.allclose(kept, unconditional, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_sixteen_bits_sample_and_differentiate(dtype: torch.dtype, plain: Infinity) -> None:
    model = plain.to(dtype)
    image, *bits = drawn(model)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    logits = model(*tiny_text(LENGTHS), model.teacher_input(bits), TINY_SCHEDULE)
    assert logits.dtype == torch.float32
    logits.mean().backward()


def test_equal_seeds_build_equal_weights_and_blocks_may_be_in_one_chunk() -> None:
    sizes = dict(bits=4, spatial_patchify=0, depth=2, embed_dim=32, num_heads=2, text_channels=16, text_maxlen=4, ch=32)
    first, again, other = (build_infinity(**sizes, block_chunks=1, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        a, b, c = a.state_dict(), b.state_dict(), c.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(not torch.equal(a[name], c[name]) for name in a)
    assert "blocks.1.sa.proj.weight" in first[1].state_dict()
    image = first[1].sample(torch.randn(2, 16), [2], TINY_SCHEDULE, g_seed=0)
    assert image.isfinite().all()


TEXT = tiny_text(LENGTHS)[0]
WRONG = [
    (dict(text=TEXT[:-1]), ValueError, "text"),
    (dict(text=TEXT[:, :-1]), ValueError, "text"),
    (dict(text=TEXT.long()), TypeError, "text"),
    (dict(text=[1.0]), TypeError, "text"),
    (dict(text=TEXT.to("meta")), ValueError, "text"),
    (dict(lengths=[8, 0]), ValueError, "lengths"),
    (dict(lengths=[]), ValueError, "lengths"),
    (dict(lengths=8), TypeError, "lengths"),
    (dict(text=tiny_text([13])[0], lengths=[13]), ValueError, "lengths"),
    (dict(schedule=[]), ValueError, "schedule"),
    (dict(schedule=[(1, 1)]), TypeError, "schedule"),
    (dict(schedule=[(1, 2, 2)]), ValueError, "schedule"),
    (dict(schedule=[(1, 1, 1), (2, 2, 2)]), ValueError, "schedule"),
    (dict(schedule=[(1, 1, 1), (1, 2, 2), (1, 1, 4)]), ValueError, "schedule"),
    (dict(schedule=[(1, 1, 1)] * 16), ValueError, "schedule"),
    (dict(schedule="1M"), TypeError, "schedule"),
    (dict(cfg=[1.0]), ValueError, "cfg"),
    (dict(cfg=float("nan")), ValueError, "cfg"),
    (dict(cfg="4"), TypeError, "cfg"),
    (dict(tau=0.0), ValueError, "tau"),
    (dict(tau=[1.0, 1.0]), ValueError, "tau"),
    (dict(top_k=-1), ValueError, "top_k"),
    (dict(top_p=1.5), ValueError, "top_p"),
    (dict(g_seed=[1]), ValueError, "g_seed"),
    (dict(g_seed=0.5), TypeError, "g_seed"),
    (dict(insertion=(1,)), ValueError, "insertion"),
    (dict(insertion=(-5,)), ValueError, "insertion"),
    (dict(insertion=0), TypeError, "insertion"),
    (dict(insertion=()), ValueError, "insertion"),
    (dict(negative=TEXT), TypeError, "negative"),
    (dict(negative=(TEXT, [8])), ValueError, "negative"),
    (dict(negative=(TEXT, [3, 4])), ValueError, "negative"),
]


@pytest.fixture(scope="module")
def shared() -> Infinity:
    return tiny_infinity()[1]


@pytest.mark.parametrize(("changes", "error", "name"), WRONG, ids=[f"{i}-{w[2]}" for i, w in enumerate(WRONG)])
def test_a_wrong_argument_is_named(changes: dict, error: type[Exception], name: str, shared: Infinity) -> None:
    arguments = {"text": TEXT, "lengths": LENGTHS, "schedule": TINY_SCHEDULE, **changes}
    with pytest.raises(error, match=f"^(lengths of )?{name}"):
        shared.sample(**arguments)


def test_wrong_inputs_of_teacher_forcing_are_named(shared: Infinity) -> None:
    with pytest.raises(ValueError, match="inputs: expected shape"):
        shared(TEXT, LENGTHS, torch.zeros(2, 17, 4), TINY_SCHEDULE)
    with pytest.raises(ValueError, match="schedule"):
        shared(TEXT, LENGTHS, torch.zeros(2, 16, 4), [(1, 2, 2)])


@pytest.mark.parametrize(
    "changes",
    [
        dict(bits=0), dict(depth=3), dict(num_heads=5), dict(embed_dim=12, num_heads=2), dict(ch=40),
        dict(text_channels=0), dict(text_maxlen=0), dict(block_chunks=3), dict(patchify=2),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        tiny_infinity(**changes)


def test_a_sample_in_inference_mode_leaves_training_and_fake_tensors_alone(plain: Infinity) -> None:
    with torch.inference_mode():
        drawn(plain)
    inputs = torch.randn(2, 16, plain.token_bits)
    plain(*tiny_text(LENGTHS), inputs, TINY_SCHEDULE).sum().backward()
    assert plain.unregistered_blocks[0].sa.mat_qkv.weight.grad.isfinite().all()
    with FakeTensorMode():
        assert isinstance(plain.angles(TALL), FakeTensor)
    assert type(plain.angles(TALL)) is Tensor
    assert all(torch.equal(a, b) for a, b in zip(drawn(plain)[1:], drawn(plain)[1:], strict=True))
