"""The sampling operation on the CPU: its reference against the public code's filters, the distribution of its draws,
and the C++ kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from support.philox import philox_uniform
from torch import Tensor

import actvar_kernels
from actvar.models.token_draw import sample_top_k_top_p
from actvar_kernels import sample_tokens
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.token_draw import reference
from actvar_kernels.token_draw.reference import LARGEST, SMALLEST, token_weights

FILTERS = [(0, 0.0), (1, 0.0), (7, 0.0), (20, 0.0), (0, 1e-9), (0, 0.5), (0, 1.0), (12, 0.8), (3, 0.999), (900, 0.96)]
"""top_k (at most the vocabulary) and top_p."""


NO_COMPILER = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
on_both_backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NO_COMPILER)])


@pytest.fixture
def backend() -> str:
    return "reference"


@pytest.fixture(autouse=True)
def _chosen_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", backend)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def unguided(logits: Tensor) -> Tensor:
    """Input `[2B, L, V]` whose guided logits are exactly `logits` `[B, L, V]` at guidance 0."""
    return torch.cat((logits, torch.zeros_like(logits)))


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("V", [20, 1000])
def test_distinct_logits_keep_the_probabilities_of_the_public_code(V: int, top_k: int, top_p: float) -> None:
    top_k = min(top_k, V)
    logits, t = normal(6, 4, V, std=2), 1.3
    filtered = (1 + t) * logits[:3] - t * logits[3:]
    sample_top_k_top_p(filtered, top_k, top_p)  # sets what it filters out to -inf
    expected = filtered.softmax(dim=-1)
    weights = token_weights(logits, t, top_k, top_p)
    assert torch.equal(weights > 0, expected > 0)
    torch.testing.assert_close(weights / weights.sum(dim=-1, keepdim=True), expected)


def kept_by_loops(logits: list[float], top_k: int, top_p: float) -> list[bool]:
    """The documented rule, for equal logits too."""
    kept = [top_k == 0 or x >= sorted(logits)[-top_k] for x in logits]
    weights = torch.tensor(logits, dtype=torch.float64).softmax(0) * torch.tensor(kept)
    weights = weights / weights.sum()
    if top_p:
        mass = [sum(w for w, y in zip(weights, logits, strict=True) if y <= x) for x in logits]
        kept = [k and (x == max(logits) or m > 1 - top_p) for k, x, m in zip(kept, logits, mass, strict=True)]
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_equal_logits_stay_or_go_together(top_k: int, top_p: float) -> None:
    logits = torch.randint(-2, 3, (5, 8, 20), generator=torch.Generator().manual_seed(0)).float()
    kept = token_weights(unguided(logits), 0.0, min(top_k, 20), top_p) > 0
    assert kept.flatten(0, 1).tolist() == [
        kept_by_loops(row, min(top_k, 20), top_p) for row in logits.view(-1, 20).tolist()
    ]


@on_both_backends
def test_the_draws_have_the_probabilities_of_the_filtered_logits() -> None:
    draws, V = 20000, 8
    logits = unguided(normal(1, 1, V).expand(1, draws, V))
    weights = token_weights(logits[:, :1], 0.0, 6, 0.95)[0, 0]
    expected = draws * weights / weights.sum()
    counts = sample_tokens(logits, 0.0, 6, 0.95, seed=0).flatten().bincount(minlength=V)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert 3 <= kept.sum() <= 6
    assert ((counts - expected).square() / expected)[kept].sum() < 25.7  # chi-square of 5 degrees: 1 in 10^4 above


@on_both_backends
def test_tokens_of_logit_minus_infinity_are_never_drawn() -> None:
    logits = normal(4, 50, 10)
    logits[..., 3:] = -torch.inf
    for top_k, top_p in ((0, 0.0), (10, 0.0), (10, 0.9)):
        assert sample_tokens(logits, 2.0, top_k, top_p, seed=0).max() <= 2


@on_both_backends
def test_noise_of_exactly_0_and_1_is_clipped() -> None:
    logits = torch.zeros(2, 2, 3)
    ends, clipped = torch.tensor([0.0, 1.0, 0.5]).expand(1, 2, 3), torch.tensor([SMALLEST, LARGEST, 0.5])
    tokens = sample_tokens(logits, 0.0, 0, 0.0, noise=ends)
    assert tokens.tolist() == [[1, 1]]
    assert torch.equal(tokens, sample_tokens(logits, 0.0, 0, 0.0, noise=clipped.expand(1, 2, 3)))
    assert torch.tensor([SMALLEST, LARGEST]).log().isfinite().all()
    assert torch.tensor(LARGEST).log() < 0


@on_both_backends
def test_the_seed_and_the_step_decide_the_draw() -> None:
    logits = torch.zeros(4, 16, 64)

    def draw(**random) -> list[int]:
        tokens = sample_tokens(logits, 1.0, 0, 0.0, **random)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (2, 16)
        return tokens.flatten().tolist()

    first = draw(seed=5)
    torch.rand(3)
    assert draw(seed=5) == draw(seed=torch.tensor([5])) == draw(seed=torch.tensor(5)) == draw(seed=5 + 2**64) == first
    assert draw(seed=-1) == draw(seed=2**64 - 1)
    draws = [first, draw(seed=6), draw(seed=5, step=1), draw(seed=5, step=2), draw(seed=-1)]
    assert len(set(map(tuple, draws))) == len(draws)


@on_both_backends
def test_halves_are_guided_in_float32() -> None:
    logits = normal(2, 3, 50).bfloat16()
    noise = uniform(1, 3, 50)
    expected = sample_tokens(logits.float(), 3.0, 9, 0.9, noise=noise)
    assert torch.equal(sample_tokens(logits, 3.0, 9, 0.9, noise=noise), expected)


@on_both_backends
def test_compiled_it_draws_what_it_draws_eagerly() -> None:
    logits, noise = normal(2, 3, 20), uniform(1, 3, 20)

    def draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return (
            sample_tokens(logits, 1.0, 5, 0.9, seed=3, step=1),
            sample_tokens(logits, 1.0, 5, 0.9, noise=noise),
        )

    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(logits, noise), draw(logits, noise)))


@on_both_backends
@pytest.mark.parametrize("seed", [None, torch.tensor([3])], ids=["number", "tensor"])
def test_the_operator_passes_the_checks_of_torch(seed: Tensor | None) -> None:
    torch.library.opcheck(
        torch.ops.actvar_kernels.sample_tokens.default, (normal(2, 3, 9), 1.0, 4, 0.9, seed, 7, 1, None)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.zeros(3, 2, 8)),
        ("logits", torch.zeros(2, 8)),
        ("top_k", -1),
        ("top_k", 9),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("seed", torch.zeros(2, dtype=torch.int64)),
        ("seed", torch.zeros(1)),
        ("seed", None),
        ("noise", torch.zeros(1, 2, 7)),
    ],
    ids=str,
)
def test_an_argument_that_does_not_fit_is_named_in_a_value_error(name: str, value: object) -> None:
    arguments = dict(logits=torch.zeros(2, 2, 8), guidance=1.0, top_k=4, top_p=0.9, seed=0)
    if name == "noise":
        del arguments["seed"]
    with pytest.raises(ValueError, match=f"^{name}"):
        sample_tokens(**{**arguments, name: value})


def test_seed_and_noise_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^seed, noise: expected exactly one of them, got both"):
        sample_tokens(torch.zeros(2, 2, 8), 1.0, 0, 0.0, seed=0, noise=uniform(1, 2, 8))


def assert_drawn_as_by_the_reference(logits: Tensor, guidance: float | None, top_k: int, top_p: float, noise: Tensor):
    """The same tokens; where rounding decides between two, one that is as good to 1e-5."""
    tokens = sample_tokens(logits, guidance, top_k, top_p, noise=noise)
    expected = reference.sample_tokens(logits, guidance, top_k, top_p, noise)
    race = token_weights(logits, guidance, top_k, top_p) / -noise.clamp(SMALLEST, LARGEST).log()
    reached, best = (race.gather(-1, index.unsqueeze(-1)) for index in (tokens, expected))
    assert (reached >= best * (1 - 1e-5)).all()
    assert (tokens == expected).double().mean() > 0.99


@NO_COMPILER
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("V", [1, 2, 7, 20, 512, 4099])
def test_in_cpp_it_draws_the_reference_tokens(V: int, top_k: int, top_p: float, dtype: torch.dtype) -> None:
    logits, noise = normal(6, 9, V, std=3).to(dtype), uniform(3, 9, V)
    assert_drawn_as_by_the_reference(logits, 1.3, min(top_k, V), top_p, noise)
    assert_drawn_as_by_the_reference(logits[:3], None, min(top_k, V), top_p, noise)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert_drawn_as_by_the_reference(strided, 1.3, min(top_k, V), top_p, noise.flip(0))
    assert_drawn_as_by_the_reference(logits[1::3], 1.3, min(top_k, V), top_p, noise[:1].mT.contiguous().mT)


@on_both_backends
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 9), (-3, 1), (2**62 + 5, 2)])
@pytest.mark.parametrize("V", [1, 102, 4096])
def test_the_noise_is_the_documented_stream(V: int, seed: int, step: int) -> None:
    logits = normal(4, 30, V)
    noise = philox_uniform(seed, 60, -(-V // 4) * 4, step)[:, :V].view(2, 30, V)
    expected = sample_tokens(logits, 1.0, 0, 0.0, noise=noise)
    assert torch.equal(sample_tokens(logits, 1.0, 0, 0.0, seed=seed, step=step), expected)


@NO_COMPILER
@pytest.mark.parametrize("backend", ["cpu"])
def test_in_cpp_the_draw_does_not_depend_on_the_threads() -> None:
    logits, threads = normal(4, 300, 100), torch.get_num_threads()
    drawn = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            drawn.append(sample_tokens(logits, 1.0, 20, 0.9, seed=1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@NO_COMPILER
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_in_cpp_logits_that_are_not_finite_give_a_token_that_exists(bad: float) -> None:
    tokens = sample_tokens(torch.full((2, 3, 9), bad), 1.0, 5, 0.9, seed=0)
    assert ((tokens >= 0) & (tokens < 9)).all()


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_without_a_compiler_cpp_raises_where_it_is_asked_for_by_name(backend: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no g++ found")
    cpu.available.cache_clear()
    logits, noise = normal(2, 3, 20), uniform(1, 3, 20)
    try:
        if backend == "auto":
            expected = reference.sample_tokens(logits, 1.0, 5, 0.9, noise)
            assert torch.equal(sample_tokens(logits, 1.0, 5, 0.9, noise=noise), expected)
            assert "no g++ found" in caplog.text
        else:
            with pytest.raises(actvar_kernels.BackendUnavailableError, match=r"'cpu' backend cannot run.*no g\+\+"):
                sample_tokens(logits, 1.0, 5, 0.9, noise=noise)
    finally:
        cpu.available.cache_clear()
