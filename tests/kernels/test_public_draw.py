"""Guidance, filters and draw in C++ against PyTorch's: the same kept sets, tokens and generator states, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var, sample
from torch import Tensor

from actvar import accelerate
from actvar.models.token_draw import guided, sample_guided, sample_top_k_top_p
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.token_draw import cpu_public, public

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
DTYPES = [torch.float32, torch.bfloat16]
FILTERS = [
    (0, 0.0),
    (1, 0.0),
    (900, 0.0),
    (900, 0.95),
    (0, 0.95),
    (0, 0.5),
    (0, 1.0),
    (3, 0.999),
    (0, 1e-9),
    (900, 0.1),
]
"""top_k (at most the vocabulary) and top_p."""


def normal(*shape: int, seed: int = 0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_filtered_as_public(logits: Tensor, guidance: float, top_k: int, top_p: float) -> None:
    expected = guided(logits, guidance)
    public.filter_(expected, top_k, top_p)
    actual = cpu_public.guide_and_filter(logits, guidance, top_k, top_p)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 17, 401, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_guided_logits_and_kept_sets_are_those_of_pytorch(top_k: int, top_p: float, V: int, dtype: torch.dtype) -> None:
    for std in (0.1, 1.0, 4.0, 40.0):
        assert_filtered_as_public(normal(4, 25, V, std=std, dtype=dtype), 1.5, min(top_k, V), top_p)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_many_equal_logits(top_k: int, top_p: float) -> None:
    logits = torch.randint(-3, 4, (4, 30, 500), generator=torch.Generator().manual_seed(0)).float()
    for factor in (0.5, 1.0):
        assert_filtered_as_public(factor * logits, 0.0, min(top_k, 500), top_p)
    assert_filtered_as_public(torch.zeros(2, 1, 500), 1.0, min(top_k, 500), top_p)
    signed_zeros = torch.where(normal(2, 20, 500) > 0, 0.0, -0.0)
    assert_filtered_as_public(signed_zeros, 0.0, min(top_k, 500), top_p)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(strange: float) -> None:
    logits = normal(2, 6, 50)
    logits[0, 1, 7] = logits[0, 2, 5:30] = strange
    logits[0, 4] = strange
    for top_k, top_p in ((0, 0.0), (20, 0.0), (0, 0.9), (20, 0.9)):
        assert_filtered_as_public(logits, 0.0, top_k, top_p)


def test_rows_that_rounding_could_decide_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    filter_ = public.filter_
    monkeypatch.setattr(public, "filter_", lambda logits, *args: rows.append(len(logits)) or filter_(logits, *args))
    logits = torch.zeros(2, 3, 4)
    logits[0, 1] = torch.tensor([4.0, 2.0, 1.0, 0.0]).log()
    logits[0, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cpu_public.guide_and_filter(logits, 0.0, 0, 4 / 7)  # 3 / 7 go: of equal logits, and of 1, 2 and 4 exactly two
    assert rows == [2]


def test_views_are_read_where_they_lie() -> None:
    logits = normal(4, 7, 3, 60)
    for view in (logits[:, :, 1], logits[:, ::2, 1], logits[:, 2:, 1].mT, logits[:, :1, 2].expand(4, 5, 60)):
        assert_filtered_as_public(view, 1.5, min(4, view.shape[2]), 0.9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 401), (40, 4096), (5, 2**17 + 1)])
@pytest.mark.parametrize("before", [0, 1, 623, 624, 625])
def test_tokens_and_the_generators_state_are_those_of_multinomial(shape: tuple[int, ...], before: int) -> None:
    probabilities = normal(*shape, std=3).softmax(dim=-1)
    probabilities[..., ::3] = 0 if shape[-1] > 1 else 1
    twins = [torch.Generator().manual_seed(2**63 + 5) for _ in range(2)]
    for twin in twins:
        torch.empty(before, dtype=torch.int32).random_(generator=twin)
    for _ in range(2):
        assert torch.equal(cpu_public.draw(probabilities, twins[0]), public.draw(probabilities, twins[1]))
        assert torch.equal(torch.rand(3, generator=twins[0]), torch.rand(3, generator=twins[1]))
        assert torch.equal(twins[0].get_state(), twins[1].get_state())


@pytest.mark.parametrize("scale", [1.0, 1e-33, 1e30])
@pytest.mark.parametrize("std", [0.0, 1.0, 20.0])
def test_tokens_are_those_of_multinomial_however_close_the_race_is(std: float, scale: float) -> None:
    for V in (2, 512):
        probabilities = normal(500_000 // V, V, std=std).softmax(dim=-1) * scale
        twins = [torch.Generator().manual_seed(V) for _ in range(2)]
        assert torch.equal(cpu_public.draw(probabilities, twins[0]), public.draw(probabilities, twins[1]))


def test_the_global_generator_and_the_normal_number_that_it_keeps() -> None:
    probabilities = normal(9, 30).softmax(dim=-1)
    found = []
    with torch.random.fork_rng(devices=[]):
        for draw in (cpu_public.draw, public.draw):
            torch.manual_seed(3)
            torch.randn(1)
            found.append((draw(probabilities, None), torch.randn(5), torch.get_rng_state()))
    assert all(map(torch.equal, *found))


def test_images_drawn_together_are_those_drawn_alone() -> None:
    probabilities = torch.randn(5, 9, 100, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    alone, together = ([torch.Generator().manual_seed(seed) for seed in range(5)] for _ in range(2))
    expected = [public.draw(image, generator) for image, generator in zip(probabilities, alone, strict=True)]
    assert torch.equal(public.draw_by_image(probabilities, together), torch.stack(expected))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.get_state(), other.get_state())
    with pytest.raises(RuntimeError, match="nan"):
        public.draw_by_image(probabilities.masked_fill(probabilities < 1e-3, torch.nan), together)


def test_what_is_no_probability_raises_as_multinomial_does_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    for wrong in (torch.nan, torch.inf, -1.0):
        probabilities = torch.full((2, 5), 0.2)
        probabilities[1, 3] = wrong
        with pytest.raises(RuntimeError, match="probability tensor contains either"):
            cpu_public.draw(probabilities, generator)
        assert torch.equal(generator.get_state(), state)


def test_it_does_not_depend_on_threads() -> None:
    logits = normal(2, 40, 900, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            filtered = cpu_public.guide_and_filter(logits, 1.5, 300, 0.95)
            found.append((filtered, cpu_public.draw(filtered.softmax(-1), torch.Generator().manual_seed(0))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("several", [False, True])
def test_tokens_are_those_of_the_public_code_with_one_generator_and_with_one_per_image(several: bool) -> None:
    logits = normal(6, 16, 500, std=2)
    found = []
    for backend in ("auto", "reference"):
        seeds = range(3) if several else [0]
        rng = [torch.Generator().manual_seed(seed) for seed in seeds]
        with using_backend(backend):
            tokens = sample_guided(logits, 2.0, 100, 0.9, rng if several else rng[0])
        found.append((tokens, *(generator.get_state() for generator in rng)))
    assert all(map(torch.equal, *found))


def test_a_version_of_pytorch_that_draws_otherwise_draws_itself(monkeypatch, caplog) -> None:
    monkeypatch.setattr(public, "draw", lambda probabilities, generator: probabilities.argmin(dim=-1))
    cpu_public._draws_as_torch.cache_clear()
    try:
        probabilities = normal(3, 9).softmax(dim=-1)
        for _ in range(2):
            assert torch.equal(cpu_public.draw(probabilities, torch.Generator()), probabilities.argmin(dim=-1))
        assert ["draws tokens in another way" in record.getMessage() for record in caplog.records] == [True]
    finally:
        cpu_public._draws_as_torch.cache_clear()


def test_an_accelerated_model_draws_in_cpp_and_one_with_a_draw_of_its_own_keeps_it(monkeypatch) -> None:
    var = make_tiny_var()
    calls = []
    filtered = cpu_public.guide_and_filter
    monkeypatch.setattr(cpu_public, "guide_and_filter", lambda *args: calls.append(1) or filtered(*args))
    sample(var)
    assert not calls
    sample(accelerate(var))
    assert len(calls) == len(var.patch_nums)

    class Own(type(make_tiny_var())):
        def draw(self, logits, guidance, top_k, top_p, rng, scale):
            own.append(scale)
            return sample_top_k_top_p(guided(logits, guidance), top_k, top_p, rng)

    own: list[int] = []
    other = make_tiny_var()
    other.__class__ = Own
    sample(accelerate(other))
    assert own == list(range(len(other.patch_nums)))
    assert len(calls) == len(var.patch_nums)
