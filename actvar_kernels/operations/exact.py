"""Say what the operations of a block must give, in float64, for the arguments of one call.

Every function takes `widen` and the arguments of its operation. The function that it returns takes a result apart.
Choices are judged by the scores they were made from. A result's kept tokens must be the highest of the result's own
scores, and its values must belong to those tokens. So rounding that swaps two nearly equal scores is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from actvar_kernels.constants import NORM_EPS
from actvar_kernels.expert_ffn import op as ffn_op
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.rotary import op as rotary_op
from actvar_kernels.scatter import op as scatter_op
from actvar_kernels.subset_attention import op as attention_op
from actvar_kernels.token_select import op as token_op
from actvar_kernels.token_select.reference import gather_rows, top_indices

Parts = Iterator[tuple[str, torch.Tensor, torch.Tensor]]
"""Name, value, and value that is due, for each part of a result. The last is met within a tolerance where it is in
float64, otherwise bit for bit."""
Widen = Callable[..., torch.Tensor]
"""Gives a tensor that sums run over in float64, and may change it by as much as these sums may be rounded."""


def wide(value: Any) -> Any:
    """Return `value`, a tensor or a tuple or dict of tensors and others, with floating-point tensors in float64."""
    if isinstance(value, dict):
        return {name: wide(item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [wide(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def select_tokens(widen: Widen, x, weight, bias, scale, shift, keep, share_guidance, in_place) -> Callable[..., Parts]:
    """Judge scores, the choice by them, and the rows that were chosen and left."""
    normalized = F.layer_norm(widen(x), x.shape[-1:], eps=NORM_EPS)
    scores = (normalized * widen(weight)).sum(dim=-1) + bias.double()

    def parts(result) -> Parts:
        yield "scores", result.scores, scores
        deciding = result.scores.chunk(2)[0] if share_guidance else result.scores
        index = top_indices(deciding, keep).repeat(2 if share_guidance else 1, 1)
        left = _left_alone(index, x)
        yield "index", result.index, index
        modulated = token_op.normalize_modulate(widen(gather_rows(x, index)), scale.double(), shift.double())
        yield "modulated rows", result.modulated, modulated
        yield "base", result.rest[left], x[left]

    return parts


def normalize_modulate(widen: Widen, x, **arguments) -> Callable[..., Parts]:
    """Judge the output."""
    exact: Any = token_op.normalize_modulate(widen(x), **wide(arguments))
    return lambda result: iter([("output", result, exact)])


def rotate_heads(widen: Widen, x, **arguments) -> Callable[..., Parts]:
    """Judge the output."""
    exact = rotary_op.rotate_heads(widen(x), **wide(arguments))
    return lambda result: iter([("output", result, exact)])


def subset_attention(widen: Widen, q, k, v, past, **arguments) -> Callable[..., Parts]:
    """Judge output, keys and values."""
    tokens = k.shape[2] + (0 if past is None else past[0].shape[2])

    def widen_values(values: torch.Tensor) -> torch.Tensor:
        return widen(values.transpose(2, 3), tokens).transpose(2, 3)

    if past is not None:
        past = widen(past[0]), widen_values(past[1])
    exact = attention_op.subset_attention(widen(q), widen(k), widen_values(v), past, **wide(arguments))

    def parts(result) -> Parts:
        for name, value, due in zip(("output", "keys", "values"), result, exact, strict=True):
            if due is not None:
                yield name, value, due

    return parts


def add_normalize(widen: Widen, x, index, update, gamma, scale, shift) -> Callable[..., Parts]:
    """Judge the sum, and its LayerNorm by the sum as it is stored."""
    rows = x if index is None else gather_rows(x, index)
    exact = rows.double() + gamma.double() * update.double()

    def parts(result) -> Parts:
        rows = result[0]
        if isinstance(rows, Residual):
            rows = rows.rows(index)
        else:
            yield "rows", rows, exact
        # of the sum as it is stored
        u = token_op.normalize_modulate(widen(rows), scale.double(), shift.double())
        yield "normalised rows", result[1], u

    return parts


def add_normalize_route(
    widen: Widen, x, index, update, gamma, scale, shift, weight, bias, active, deferred
) -> Callable[..., Parts]:
    """Judge what `add_normalize` gives, logits, and the choice by them."""
    before_routing = add_normalize(widen, x, index, update, gamma, scale, shift)

    def parts(result) -> Parts:
        yield from before_routing(result)
        yield from route_experts(widen, result.u, weight, bias, active)((result.mask, result.logits))

    return parts


def route_experts(widen: Widen, u, weight, bias, active) -> Callable[..., Parts]:
    """Judge logits, and the choice by them."""

    def parts(result) -> Parts:
        mask, logits = result
        yield "logits", logits, F.linear(widen(u), weight.double(), bias.double())
        yield "experts", mask, torch.zeros_like(mask).scatter(-1, top_indices(logits, active), True)

    return parts


def expert_ffn_scatter(widen: Widen, **arguments) -> Callable[..., Parts]:
    """Judge all rows, and bit for bit those that are left alone."""
    rows, index = arguments["rows"], arguments["index"]
    if isinstance(rows, Residual):  # as it would be stored
        arguments = arguments | {"rows": rows.rows(index)}
    weights = {name: widen(arguments[name]) for name in ("fc1_weight", "fc2_weight")}
    return _scattered(ffn_op.expert_ffn_scatter(**wide(arguments | weights)), arguments)


def scatter_rows(widen: Widen, **arguments) -> Callable[..., Parts]:
    """Judge all rows, and bit for bit those that are left alone."""
    return _scattered(scatter_op.scatter_rows(**wide(arguments)), arguments)


def _scattered(exact: torch.Tensor, arguments: dict) -> Callable[..., Parts]:
    index, rest = arguments["index"], arguments["rest"]

    def parts(result) -> Parts:
        yield "output", result, exact
        if index is not None:
            left = _left_alone(index, rest)
            yield "rows left alone", result[left], exact[left].to(rest.dtype)

    return parts


def _left_alone(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a mask `[R, L]` of the rows of `x` `[R, L, C]` that `index` `[R, K]` leaves out."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, index, False)
