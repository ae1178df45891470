"""The patch on Infinity: rates of 1 draw the dense model's bits, sparse scales compute what they should."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text
from torch import Tensor, nn

from actvar import (
    ActVARConfig,
    Execution,
    accelerate,
    apply_patch,
    load_adapter,
    patched,
    record,
    remove_patch,
    save_adapter,
)
from actvar.models import Infinity
from actvar.models.infinity import layers
from actvar.models.infinity.arguments import checked_draw
from actvar.models.infinity.schedules import tokens_of
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu

LENGTHS = [3, 5]
ONES = dict(token_rates=(1, 1), ffn_rate=1)
SPARSE = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.75)
TALL = [(1, 1, 1), (1, 3, 2), (1, 5, 3)]
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="no compiler"))]


@pytest.fixture(params=[False, True], ids=["one place a token", "patchified"])
def infinity(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Infinity:
    return without_decoder(request.param, monkeypatch)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Infinity:
    return without_decoder(False, monkeypatch)


def without_decoder(patchify: bool, monkeypatch: pytest.MonkeyPatch) -> Infinity:
    """Return a model that draws bits alone.

    It does not round in cross-attention, where sums in another order may fall to the other side.
    """
    monkeypatch.setattr(layers, "rounded", lambda x: x)
    infinity = tiny_infinity(patchify)[1]
    infinity.decode = lambda features: features
    return infinity


def drawn(infinity: Infinity, schedule: list[tuple[int, int, int]] = TINY_SCHEDULE, **changes) -> list[Tensor]:
    """Return the bits of every scale."""
    arguments = {"g_seed": 1, "tau": 1.0, **changes}
    return infinity.sample(*tiny_text(LENGTHS), schedule, **arguments, return_bits=True)[1]


def equal(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def random_inputs(infinity: Infinity, rows: int = 2) -> Tensor:
    return torch.randn(rows, sum(tokens_of(TINY_SCHEDULE)) - 1, infinity.token_bits, generator=seeded())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def logits_by_scale(infinity: Infinity, inputs: Tensor) -> Tensor:
    """Return the logits `[B, L, V]` that sampling computes of given inputs, through the K/V cache."""
    condition = infinity.condition(tiny_text(LENGTHS)[0].to(inputs.dtype), LENGTHS)
    draw = checked_draw(len(TINY_SCHEDULE), infinity.depth, 1.0, 1.0, 0, 0.0, None, (0,))
    of_scale = [None, *inputs.split(tokens_of(TINY_SCHEDULE)[1:], dim=1)]
    logits = []
    with infinity.sampling(TINY_SCHEDULE, draw):
        for scale, scale_inputs in enumerate(of_scale):
            x = infinity.embedded(scale, scale_inputs, condition)
            x = infinity.run_blocks(TINY_SCHEDULE, scale, x, condition, draw)
            logits.append(infinity.get_logits(x, condition.pooled))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("insertion", [(0,), (-2,), (0, -1)], ids=str)
@pytest.mark.parametrize("kv", ["compact", "all"])
@pytest.mark.parametrize("forced", [False, True], ids=["switched off", "forced"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_of_one_draw_the_bits_of_the_dense_model(
    infinity: Infinity, backend: str, forced: bool, kv: str, insertion: tuple[int, ...]
) -> None:
    dense = drawn(infinity, insertion=insertion)
    with using_backend(backend), patched(infinity, ActVARConfig(**ONES, kv=kv, always_sparse=forced)):
        assert all(equal(drawn(infinity, insertion=insertion), dense))


def test_a_patch_is_sparse_and_comes_off_bit_for_bit(infinity: Infinity) -> None:
    before, dense = fingerprint(infinity), drawn(infinity)
    apply_patch(infinity, SPARSE)
    with record(infinity) as records:
        assert not all(equal(drawn(infinity), dense))
    kept = [(r.block, r.scale.index, r.index.shape, int(r.mask[0, 0].sum())) for r in records]
    assert kept == [(block, scale, (4, keep), 12) for scale, keep in ((1, 2), (2, 9)) for block in range(4)]
    remove_patch(infinity)
    assert_same_fingerprint(before, fingerprint(infinity))
    assert all(equal(drawn(infinity), dense))


@pytest.mark.parametrize("config", [SPARSE, ActVARConfig(**vars(SPARSE) | {"kv": "all"})], ids=["compact", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_and_teacher_forcing_compute_the_same(infinity: Infinity, backend: str, config: ActVARConfig) -> None:
    inputs = random_inputs(infinity)
    with using_backend(backend), patched(infinity, config):
        sampled = logits_by_scale(infinity, inputs)
    with using_backend("reference"), patched(infinity, config), torch.no_grad():
        forced = infinity(*tiny_text(LENGTHS), inputs, TINY_SCHEDULE)
    torch.testing.assert_close(sampled, forced, rtol=0, atol=2e-5 * float(forced.abs().max()))


def test_kept_tokens_are_rotated_by_their_own_place(plain: Infinity) -> None:
    inputs = random_inputs(plain)
    apply_patch(plain, SPARSE)
    right = logits_by_scale(plain, inputs)
    in_order = [tuple(scale) for scale in TINY_SCHEDULE[:-1]] + [(1, 4, 3)]
    plain.angles = lambda _: Infinity.angles(plain, in_order)
    assert not torch.allclose(logits_by_scale(plain, inputs), right, atol=1e-3)


@pytest.mark.parametrize("insertion", [(0,), (-2,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_until_draws_the_bits_of_a_strength_of_one(
    infinity: Infinity, backend: str, insertion: tuple[int, ...]
) -> None:
    """Compare with a strength of 1, where the rows of the texts alone decide and the others never reach them."""
    dense = drawn(infinity, cfg=(4.0, 4.0, 1.0), insertion=insertion)
    with using_backend(backend), patched(infinity, ActVARConfig(**ONES, guidance_until=-1)):
        assert all(equal(drawn(infinity, insertion=insertion), dense))
        assert drawn(infinity, cfg=1.0)[-1].shape == dense[-1].shape


def test_a_scale_without_guidance_has_half_the_rows(plain: Infinity) -> None:
    apply_patch(plain, ActVARConfig(**vars(SPARSE) | {"guidance_until": -1}))
    with record(plain) as records:
        drawn(plain)
    assert [len(r.index) for r in records] == [4] * 4 + [2] * 4


def test_every_sample_brings_its_own_schedule(plain: Infinity) -> None:
    dense = [drawn(plain, schedule) for schedule in (TINY_SCHEDULE, TALL)]
    apply_patch(plain, ActVARConfig(**ONES, always_sparse=True))
    for schedule, bits in zip((TINY_SCHEDULE, TALL, TINY_SCHEDULE), (*dense, dense[0]), strict=True):
        assert all(equal(drawn(plain, schedule), bits))
    apply_patch(plain, ActVARConfig(scales=(-3, -2, -1), token_rates=(0.5, 0.5, 0.25), ffn_rate=0.75))
    drawn(plain)
    with pytest.raises(ValueError, match="scales: the model has 2 scales, got index -3"):
        drawn(plain, TINY_SCHEDULE[:2])
    drawn(plain)


def test_an_adapter_fits_models_of_its_sizes(plain: Infinity, tmp_path: Path) -> None:
    apply_patch(plain, SPARSE)
    with torch.no_grad():
        for block in plain.unregistered_blocks:
            block.actvar.selector.weight.normal_(generator=seeded())
    bits = drawn(plain)
    save_adapter(plain, tmp_path / "a.safetensors")
    remove_patch(plain)
    load_adapter(plain, tmp_path / "a.safetensors")
    assert all(equal(drawn(plain), bits))
    with pytest.raises(ValueError, match=r"made for a model with .*'depth': 4"):
        load_adapter(tiny_infinity(depth=2)[1], tmp_path / "a.safetensors")


@contextmanager
def weights_in_bfloat16(infinity: Infinity) -> Iterator[None]:
    """Keep blocks and head in bfloat16 while the context is open; the residual stream stays float32."""
    before = copy.deepcopy(infinity.state_dict())
    try:
        infinity.bfloat16()
        yield
    finally:
        infinity.float().load_state_dict(before)


@pytest.mark.parametrize("config", [ActVARConfig(**ONES), SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_16_bits_are_as_near_to_float64_as_in_the_dense_model(
    plain: Infinity, backend: str, config: ActVARConfig
) -> None:
    inputs, wide = random_inputs(plain).bfloat16().float(), copy.deepcopy(plain).bfloat16().double()
    exact = logits_by_scale(wide, inputs.double())
    with weights_in_bfloat16(plain):
        error = (logits_by_scale(plain, inputs) - exact).norm()
        if config.is_sparse:  # which tokens are kept may differ, so the sparse model is its own measure
            with using_backend("reference"), patched(plain, config):
                exact = logits_by_scale(plain, inputs).double()
        with using_backend(backend), patched(plain, config):
            ours = logits_by_scale(plain, inputs)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.5 * error


def test_layers_that_are_more_than_their_weight_are_called(plain: Infinity) -> None:
    apply_patch(plain, SPARSE)
    bits, calls = drawn(plain), []
    block = plain.unregistered_blocks[1]
    parts: tuple[nn.Module, ...] = (block.sa, block.ca, block.ca.mat_q)
    for part in parts:
        part.register_forward_hook(lambda *_: calls.append(1))
    assert all(equal(drawn(plain), bits))
    assert len(calls) == len(parts) * len(TINY_SCHEDULE)


def test_a_hook_on_the_experts_is_refused(plain: Infinity) -> None:
    plain.unregistered_blocks[1].ffn.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"blocks\[1\].ffn: expected plain layers, which the experts can read"):
        apply_patch(plain, SPARSE)


@pytest.mark.parametrize("config", [ActVARConfig(**ONES), SPARSE], ids=["dense", "sparse"])
def test_eight_bits_change_logits_by_their_rounding(plain: Infinity, config: ActVARConfig) -> None:
    inputs = random_inputs(plain)
    with using_backend("reference"), patched(plain, config):
        exact = logits_by_scale(plain, inputs)
    with using_backend("reference"):
        apply_patch(plain, config, Execution(weights="int8"))
        rounded = logits_by_scale(plain, inputs)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1


def test_the_fast_sampler_draws_by_seeds_of_images_and_by_the_logits(plain: Infinity) -> None:
    accelerate(plain, Execution(sampler="fast"))
    seeds = [(1 << 62) + 5, 7]
    together = drawn(plain, g_seed=seeds)
    text, lengths = tiny_text(LENGTHS)
    for image, alone in enumerate(text.split(lengths)):
        bits = plain.sample(alone, [len(alone)], TINY_SCHEDULE, g_seed=seeds[image], tau=1.0, return_bits=True)[1]
        assert all(equal([b[image : image + 1] for b in together], bits))
    assert not all(equal(drawn(plain), drawn(plain, g_seed=2)))
    likely = [drawn(plain, g_seed=seed, top_p=1e-6) for seed in (1, 2)]  # the likelier value of each bit
    assert all(equal(*likely))
    remove_patch(plain)
    assert all(equal(likely[0], drawn(plain, top_p=1e-6)))


def test_the_decoder_runs_in_the_precision_that_is_asked_for() -> None:
    infinity = tiny_infinity()[1]
    arguments = (*tiny_text(LENGTHS), TINY_SCHEDULE)
    images = infinity.sample(*arguments, g_seed=1)
    accelerate(infinity, Execution(decoder_dtype="bfloat16"))
    rounded = infinity.sample(*arguments, g_seed=1)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - images).abs().mean() < 0.01


def test_keys_and_values_are_kept_without_those_of_the_last_scale(plain: Infinity) -> None:
    if not cpu.available():
        pytest.skip("no compiler")
    accelerate(plain)
    with using_backend("cpu"):
        drawn(plain)
    buffers = [block.actvar.cache.kv_buffer for block in plain.unregistered_blocks]
    assert [tuple(keys.shape) for keys, _ in buffers] == [(4, 2, 5, 32)] * 4
    assert all(block.sa.cached_k is None and block.ca.cached_kv is None for block in plain.unregistered_blocks)


def test_early_scales_have_the_weights_of_the_model(plain: Infinity, tmp_path: Path) -> None:
    dense, inputs = drawn(plain), random_inputs(plain)
    tuned = copy.deepcopy(plain)
    with torch.no_grad():
        tuned.head.weight.mul_(-1)
    apply_patch(plain, ActVARConfig(**ONES, weights_from=-1))
    from actvar.utils.weight_override import replace_parameters

    replace_parameters(plain, {"head.weight": tuned.head.weight})
    bits = drawn(plain)
    assert equal(bits, dense) == [True, True, False]
    with torch.no_grad():
        logits = plain(*tiny_text(LENGTHS), inputs, TINY_SCHEDULE)
        remove_patch(plain)
        own, others = (model(*tiny_text(LENGTHS), inputs, TINY_SCHEDULE) for model in (plain, tuned))
    torch.testing.assert_close(logits, torch.cat((own[:, :5], others[:, 5:]), dim=1), rtol=0, atol=1e-4)
