"""Attention of kept tokens with its cache, values and gradients, against loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kernel_loops import EXACT, LOW_DTYPES, assert_close, gradients, loops_in, normal
from torch import Tensor
from torch.nn import functional as F

from actvar_kernels import subset_attention

pytestmark = pytest.mark.usefixtures("reference_backend")


def looped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    head_scale: Tensor | None,
    mask: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """Output, keys and values, flattened into one vector."""
    outputs, all_keys, all_values = [], [], []
    R, H, K, _ = q.shape
    for row in range(R):
        for head in range(H):
            keys = [] if past_k is None else list(past_k[row, head])
            values = [] if past_v is None else list(past_v[row, head])
            for key, value in zip(k[row, head], v[row, head], strict=True):
                keys.append(key if head_scale is None else key / key.norm())
                values.append(value)
            for query in range(K):
                vector = q[row, head, query]
                if head_scale is not None:
                    vector = vector / vector.norm() * head_scale[head]
                logits = torch.stack([softmax_scale * (vector * key).sum() for key in keys])
                if mask is not None:
                    logits = logits + mask[query]
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                outputs.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            all_keys.extend(keys)
            all_values.extend(values)
    d, T = q.shape[-1], len(keys)
    output = torch.stack(outputs).reshape(R, H, K, d).transpose(1, 2)
    cache = [torch.stack(part).reshape(R, H, T, d) for part in (all_keys, all_values)]
    return torch.cat([part.flatten() for part in (output, *cache)])


ATTENTION = {
    "first scale": dict(past=0, normed=True, masked=False, own=3),
    "with a past": dict(past=4, normed=True, masked=False, own=3),
    "keys of all tokens": dict(past=4, normed=True, masked=False, own=6),
    "no QK norm": dict(past=2, normed=False, masked=False, own=3),
    "masked": dict(past=0, normed=True, masked=True, own=5),
    "masked, with a past, no QK norm": dict(past=3, normed=False, masked=True, own=4),
}


def attention_inputs(
    past: int, normed: bool, masked: bool, own: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor | None], float]:
    """q, k, v, past keys, past values, head scales, mask; and the softmax scale."""
    R, H, K = 2, 2, 3
    shapes = [(R, H, K, head_dim), (R, H, own, head_dim), (R, H, own, head_dim)]
    q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    past_k = F.normalize(normal(R, H, past, head_dim, seed=3), dim=-1) if past else None
    past_v = normal(R, H, past, head_dim, seed=4) if past else None
    head_scale = torch.tensor([1.5, 4.0]) if normed else None
    mask = None
    if masked:
        mask = torch.zeros(K, past + own)
        mask[0, -2:] = mask[1, -1:] = -torch.inf
        mask[:, 0] = 0.5
    tensors = [None if t is None else t.to(dtype) for t in (q, k, v, past_k, past_v, head_scale, mask)]
    return tensors, 1.0 if normed else 0.25 / head_dim**0.5


def flat_attention(*tensors: Tensor | None, softmax_scale: float) -> Tensor:
    q, k, v, past_k, past_v, head_scale, mask = tensors
    past = None if past_k is None else (past_k, past_v)
    output, keys, values = subset_attention(q, k, v, past, head_scale, softmax_scale, mask)
    assert output.shape == (q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
    assert output.dtype == keys.dtype == values.dtype == q.dtype
    return torch.cat([part.flatten() for part in (output, keys, values)])


@pytest.mark.parametrize("name", ATTENTION)
def test_subset_attention_in_float64_is_the_loops(name: str) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=64, dtype=torch.float64)
    actual = flat_attention(*tensors, softmax_scale=softmax_scale)
    assert_close(actual, looped_attention(*tensors, softmax_scale=softmax_scale), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_DTYPES], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_subset_attention_in_lower_precision_has_no_more_than_its_rounding(name: str, dtype: torch.dtype) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=64, dtype=dtype)
    exact, tolerance = loops_in(dtype, lambda *t: looped_attention(*t, softmax_scale=softmax_scale), *tensors)
    assert_close(flat_attention(*tensors, softmax_scale=softmax_scale), exact, tolerance)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_gradients_of_subset_attention_are_those_of_the_loops(name: str) -> None:
    tensors, softmax_scale = attention_inputs(**ATTENTION[name], head_dim=4, dtype=torch.float64)
    *learned, mask = tensors

    def gradients_of(attention: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [None if t is None else t.clone().requires_grad_(True) for t in learned]
        output = attention(*inputs, mask, softmax_scale=softmax_scale)
        return gradients(output, [t for t in inputs if t is not None])

    for actual, exact in zip(gradients_of(flat_attention), gradients_of(looped_attention), strict=True):
        assert_close(actual, exact, EXACT)
    inputs = [None if t is None else t.clone().requires_grad_(True) for t in learned]
    assert torch.autograd.gradcheck(lambda *t: flat_attention(*t, mask, softmax_scale=softmax_scale), inputs)


def test_cached_keys_are_appended_to_and_not_normalised_again() -> None:
    tensors, softmax_scale = attention_inputs(4, True, False, 3, 64, torch.float32)
    q, k, v, past_k, past_v, head_scale, _ = tensors
    past_k = 3 * past_k
    _, keys, values = subset_attention(q, k, v, (past_k, past_v), head_scale, softmax_scale)
    assert torch.equal(keys[:, :, :4], past_k)
    assert torch.equal(values, torch.cat((past_v, v), dim=2))
    assert_close(keys[:, :, 4:].norm(dim=-1), torch.ones(2, 2, 3), 1e-6)
