"""The sampling kernel against the reference with equal noise, its support token by token, and its random stream."""

from __future__ import annotations

import pytest
import torch
from comparison import normal
from support.philox import philox_uniform
from torch import Tensor

from actvar_kernels import BackendUnavailableError, sample_tokens
from actvar_kernels.token_draw import reference

FILTERS = [(0, 0.0), (1, 0.0), (4, 0.0), (10, 0.0), (0, 1e-9), (0, 0.5), (0, 1.0), (7, 0.8), (3, 0.999)]
"""top_k and top_p."""


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(B: int, L: int, V: int, std: float = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(2 * B, L, V, std=std, dtype=dtype)


@pytest.mark.parametrize(
    ("V", "top_k", "top_p"),
    [(1, 0, 0.0), (1, 1, 0.5), (100, 0, 0.0), (100, 100, 0.7), (512, 90, 0.96), (4096, 900, 0.96)],
)
def test_with_equal_noise_it_draws_the_reference_tokens(V: int, top_k: int, top_p: float, grid_order: str) -> None:
    logits, noise = logits_of(2, 2, V), uniform(2, 2, V)
    tokens = sample_tokens(logits, 1.3, top_k, top_p, noise=noise)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, reference.sample_tokens(logits, 1.3, top_k, top_p, noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_guided_in_float32(dtype: torch.dtype) -> None:
    logits, noise = logits_of(1, 3, 100, dtype=dtype), uniform(1, 3, 100)
    tokens = sample_tokens(logits, 3.0, 20, 0.9, noise=noise)
    assert torch.equal(tokens, reference.sample_tokens(logits.float(), 3.0, 20, 0.9, noise))


@pytest.mark.parametrize("guidance", [0.0, 40.0, 1e4])
def test_any_strength_of_guidance(guidance: float) -> None:
    logits, noise = logits_of(1, 3, 100), uniform(1, 3, 100)
    tokens = sample_tokens(logits, guidance, 20, 0.9, noise=noise)
    assert torch.equal(tokens, reference.sample_tokens(logits, guidance, 20, 0.9, noise))


def test_logits_and_noise_may_have_any_strides() -> None:
    logits, noise = logits_of(2, 3, 40).transpose(0, 1)[:, :, ::2], uniform(3, 20, 2).permute(2, 0, 1)[..., :20]
    logits, noise = logits.transpose(0, 1), noise
    tokens = sample_tokens(logits, 1.0, 9, 0.9, noise=noise)
    assert torch.equal(tokens, reference.sample_tokens(logits.contiguous(), 1.0, 9, 0.9, noise.contiguous()))


def test_logits_that_are_guided_already() -> None:
    logits, noise = logits_of(2, 3, 100), uniform(4, 3, 100)
    tokens = sample_tokens(logits, None, 20, 0.9, noise=noise)
    assert torch.equal(tokens, reference.sample_tokens(logits, None, 20, 0.9, noise))
    pairs = torch.cat((logits, torch.zeros_like(logits)))
    assert torch.equal(tokens, sample_tokens(pairs, 0.0, 20, 0.9, noise=noise))
    assert torch.equal(sample_tokens(logits, None, 0, 0.9, seed=5), sample_tokens(pairs, 0.0, 0, 0.9, seed=5))


HARD = {
    "two values": lambda V: (torch.arange(V) % 3 == 0).float(),
    "two clusters": lambda V: torch.where(torch.arange(V) % 4 == 0, 12.0, 0.0) + normal(V, dtype=torch.float32),
    "all equal": lambda V: torch.full((V,), 2.0),
    "one far above": lambda V: torch.where(torch.arange(V) == 7, 1e30, normal(V, dtype=torch.float32)),
    "tiny differences": lambda V: 1 + normal(V, std=1e-6, dtype=torch.float32),
    "steps of bfloat16": lambda V: normal(V, std=0.5).bfloat16().float(),
    "mostly minus infinity": lambda V: torch.where(
        torch.arange(V) % 9 == 0, normal(V, dtype=torch.float32), -torch.inf
    ),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.0), (150, 0.0), (511, 0.9), (150, 0.96), (0, 0.5), (0, 0.999)])
def test_the_thresholds_are_found_whatever_the_logits(kind: str, top_k: int, top_p: float) -> None:
    """The noise lets the lowest logit win that is not filtered out."""
    logits = HARD[kind](512)
    rank = logits.argsort().argsort()
    noise = torch.exp(-torch.exp(-20.0 + 0.1 * rank)).expand(1, 1, 512)
    logits = logits.expand(1, 1, 512)
    assert torch.equal(
        sample_tokens(logits, None, top_k, top_p, noise=noise),
        reference.sample_tokens(logits, None, top_k, top_p, noise),
    )


def unguided(logits: Tensor) -> Tensor:
    """`[2, 1, V]` whose guided logits are `logits` `[V]` at guidance 0."""
    return torch.stack((logits, torch.zeros_like(logits))).unsqueeze(1)


def kept(logits: Tensor, guidance: float, top_k: int, top_p: float) -> list[bool]:
    """Which tokens of `logits` `[2, 1, V]` the kernel can draw: each is given, once, noise that makes it win."""
    V = logits.shape[2]
    noise = torch.full((V, V), 1e-10).fill_diagonal_(1).unsqueeze(0)
    tokens = sample_tokens(logits.expand(2, V, V), guidance, top_k, top_p, noise=noise)
    return (tokens[0] == torch.arange(V)).tolist()


def kept_by_reference(logits: Tensor, guidance: float, top_k: int, top_p: float) -> list[bool]:
    return (reference.token_weights(logits, guidance, top_k, top_p)[0, 0] > 0).tolist()


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_every_token_is_kept_or_filtered_as_by_the_reference(top_k: int, top_p: float) -> None:
    logits = logits_of(1, 1, 10, std=1)
    assert kept(logits, 1.5, top_k, top_p) == kept_by_reference(logits, 1.5, top_k, top_p)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (3, 0.0, [1, 1, 1, 1, 0, 0, 0]),
        (5, 0.0, [1, 1, 1, 1, 1, 1, 0]),
        (0, 0.5, [1, 1, 0, 0, 0, 0, 0]),
        (0, 0.75, [1, 1, 1, 1, 0, 0, 0]),
        (3, 0.8, [1, 1, 1, 1, 0, 0, 0]),
        (3, 0.7, [1, 1, 0, 0, 0, 0, 0]),
        (1, 1e-9, [1, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_equal_logits_stay_or_go_together(top_k: int, top_p: float, expected: list[int]) -> None:
    # probabilities 12, 12, 4, 4, 1, 1 and 0 of 34
    logits = torch.tensor([12.0, 12, 4, 4, 1, 1, 0]).log()
    assert kept(unguided(logits), 0.0, top_k, top_p) == [bool(k) for k in expected]


def test_zero_and_minus_zero_are_equal_logits() -> None:
    assert kept(unguided(torch.tensor([0.0, -0.0, -1.0])), 0.0, 1, 0.0) == [True, True, False]


@pytest.mark.parametrize(("top_k", "top_p", "finite"), [(0, 0.0, 7), (10, 0.0, 7), (10, 0.999, 7), (5, 0.0, 5)])
def test_tokens_of_logit_minus_infinity_are_never_drawn(top_k: int, top_p: float, finite: int) -> None:
    logits = logits_of(1, 1, 10, std=1)
    logits[0, 0, [0, 4, 9]] = -torch.inf
    for uncond in (logits[1:], logits[:1]):  # finite, and minus infinity under both conditions
        both = torch.cat((logits[:1], uncond))
        survivors = kept(both, 0.5, top_k, top_p)
        assert survivors == kept_by_reference(both, 0.5, top_k, top_p)
        assert sum(survivors) == finite
        assert not any(survivors[token] for token in (0, 4, 9))


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 9), (-3, 1), (2**62 + 5, 2)])
def test_the_noise_is_the_documented_stream(seed: int, step: int, grid_order: str) -> None:
    logits = logits_of(2, 3, 100)
    noise = philox_uniform(seed, 6, 100, step).view(2, 3, 100)
    expected = reference.sample_tokens(logits, 1.0, 0, 0.0, noise)
    assert torch.equal(sample_tokens(logits, 1.0, 0, 0.0, seed=seed, step=step), expected)
    assert torch.equal(sample_tokens(logits, 1.0, 0, 0.0, seed=torch.tensor([seed]), step=step), expected)


def test_with_a_seed_per_image_each_has_the_tokens_of_a_batch_of_it_alone(grid_order: str) -> None:
    logits, seeds = logits_of(3, 2, 50), [5, -7, 2**62]
    together = sample_tokens(logits, 1.0, 20, 0.9, seed=torch.tensor(seeds), step=3)
    alone = [sample_tokens(logits[image::3], 1.0, 20, 0.9, seed=seed, step=3) for image, seed in enumerate(seeds)]
    assert torch.equal(together, torch.cat(alone))
    guided = logits[:3]
    together = sample_tokens(guided, None, 0, 0.0, seed=torch.tensor(seeds), step=3)
    alone = [sample_tokens(guided[image : image + 1], None, 0, 0.0, seed=s, step=3) for image, s in enumerate(seeds)]
    assert torch.equal(together, torch.cat(alone))


def test_the_draws_have_the_probabilities_of_the_logits() -> None:
    probabilities = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1, 0.0])
    draws = 250
    logits = torch.stack((probabilities.log(), torch.zeros(6))).unsqueeze(1).expand(2, draws, 6)
    counts = sample_tokens(logits, 0.0, 0, 0.0, seed=0).flatten().bincount(minlength=6)
    assert counts[5] == 0
    expected = draws * probabilities[:5]
    chi_square = ((counts[:5] - expected).square() / expected).sum()
    assert chi_square < 23.5  # 4 degrees of freedom: 1 in 10^4 above


def test_compiled_it_draws_what_it_draws_eagerly() -> None:
    def draw(logits: Tensor, seed: Tensor) -> Tensor:
        return sample_tokens(logits, 1.0, 0, 0.0, seed=seed, step=1)

    arguments = logits_of(1, 2, 20), torch.tensor([3])
    assert torch.equal(torch.compile(draw, backend="eager", fullgraph=True)(*arguments), draw(*arguments))


def test_the_operator_passes_the_checks_of_torch() -> None:
    arguments = (logits_of(1, 1, 9), 1.0, 0, 0.0, torch.tensor([3]), 0, 1, None)
    torch.library.opcheck(torch.ops.actvar_kernels.sample_tokens.default, arguments)


def test_a_vocabulary_beyond_the_kernel_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="sample_tokens"):
        sample_tokens(torch.zeros(2, 1, 16385), 1.0, 0, 0.0, seed=0)
