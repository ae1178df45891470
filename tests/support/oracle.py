"""Compute an ActVAR block in float64, one token at a time: the judge of the packages' tensor code.

Nothing here is shared with the packages. A block is the plain tensors of its `state_dict`; rows, tokens, heads and
experts are Python loops. `R` rows, `L` tokens, width `C`, `H = C / 64` heads, `N` experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEAD_DIM = 64
Weights = Mapping[str, Tensor]
KeyValue = tuple[Tensor, Tensor]
"""Key and value of one token, each `[H, 64]`, or of several, `[T, H, 64]`; keys are already normalised."""
Cache = list[list[KeyValue]]
"""Keys and values that later queries see, by row and in the order of the sequence."""


@dataclass(frozen=True)
class Gates:
    """Hold the selector `[1, C]`, `[1]` and the router `[N, C]`, `[N]` of one block."""

    selector_weight: Tensor
    selector_bias: Tensor
    router_weight: Tensor
    router_bias: Tensor


@dataclass(frozen=True)
class Active:
    """Describe an active scale: K kept tokens, M experts per token, whose K/V are cached, who decides if guided."""

    keep: int
    experts: int
    kv: str = "compact"
    share_guidance: bool = False


@dataclass
class Chosen:
    """Hold the choices of a block at one scale, row by row.

    `tokens[r]`: kept tokens, ascending; `scores[r]`: score per token; `experts[r][j]`: experts of the j-th kept
    token, ascending; `logits[r][j]`: the router's logits.
    """

    tokens: list[list[int]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    experts: list[list[list[int]]] = field(default_factory=list)
    logits: list[list[list[float]]] = field(default_factory=list)


def in_float64(tensors: Weights) -> Weights:
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def rate_to_count(rate: float, total: int) -> int:
    """Return how many of L tokens or N experts a rate keeps."""
    return max(1, math.floor(rate * total + 0.5))


def highest(scores: Sequence[float], count: int) -> list[int]:
    """Return the indices of the `count` highest scores in ascending order; of equal ones the lower index goes first."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[:count])


def layer_norm(token: Tensor) -> Tensor:
    """Return the LayerNorm of one token `[C]` without an affine part, eps 1e-6."""
    deviation = token - token.mean()
    return deviation / torch.sqrt((deviation**2).mean() + 1e-6)


def gelu_tanh(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def modulate(token: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return layer_norm(token) * (1 + scale) + shift


def linear(weight: Tensor, bias: Tensor, u: Tensor) -> Tensor:
    return weight @ u + bias


def modulation(weights: Weights, cond: Tensor) -> tuple[Tensor, ...]:
    """Return gamma1, gamma2, scale1, scale2, shift1 and shift2, each `[C]`, of one row's condition.

    The condition is `[C]`, or `[1, 6, C]` with shared AdaLN, where the block only adds its own offset.
    """
    if "ada_gss" in weights:
        six = (weights["ada_gss"].flatten(0, 2) + cond.flatten(0, 1)).flatten()
    else:
        six = linear(weights["ada_lin.1.weight"], weights["ada_lin.1.bias"], cond * torch.sigmoid(cond))
    C = six.shape[0] // 6
    return tuple(six[part * C : (part + 1) * C] for part in range(6))


def query_key_value(weights: Weights, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of one token `[C]`, each `[H, 64]`; q carries the softmax scale, and q and k the QK norm."""
    no_bias = torch.zeros_like(weights["attn.q_bias"])
    bias = torch.cat((weights["attn.q_bias"], no_bias, weights["attn.v_bias"]))
    heads = u.shape[0] // HEAD_DIM
    q, k, v = linear(weights["attn.mat_qkv.weight"], bias, u).reshape(3, heads, HEAD_DIM)
    queries, keys = [], []
    for head in range(heads):
        if "attn.scale_mul_1H11" in weights:
            log_scale = min(weights["attn.scale_mul_1H11"].flatten()[head].item(), math.log(100))
            queries.append(q[head] / q[head].norm() * math.exp(log_scale))
            keys.append(k[head] / k[head].norm())
        else:
            queries.append(q[head] * 0.25 / math.sqrt(HEAD_DIM))
            keys.append(k[head])
    return torch.stack(queries), torch.stack(keys), v


def attend(query: Tensor, seen: KeyValue) -> Tensor:
    """Return the attention output `[C]` of one query `[H, 64]` over keys and values, each `[T, H, 64]`."""
    keys, values = seen
    outputs = []
    for head in range(query.shape[0]):
        logits = keys[:, head] @ query[head]
        weights = torch.exp(logits - logits.max())
        outputs.append((weights / weights.sum()) @ values[:, head])
    return torch.cat(outputs)


def stacked(tokens: Sequence[KeyValue]) -> KeyValue:
    return torch.stack([key for key, _ in tokens]), torch.stack([value for _, value in tokens])


def attention(weights: Weights, query: Tensor, seen: KeyValue) -> Tensor:
    return linear(weights["attn.proj.weight"], weights["attn.proj.bias"], attend(query, seen))


def dense_ffn(weights: Weights, u: Tensor) -> Tensor:
    hidden = gelu_tanh(linear(weights["ffn.fc1.weight"], weights["ffn.fc1.bias"], u))
    return linear(weights["ffn.fc2.weight"], weights["ffn.fc2.bias"], hidden)


def expert_ffn(weights: Weights, u: Tensor, experts: Iterable[int], num_experts: int) -> Tensor:
    """Return `b2` plus the outputs of the chosen experts; expert e owns the e-th of N equal groups of hidden units."""
    width = weights["ffn.fc1.weight"].shape[0] // num_experts
    y = weights["ffn.fc2.bias"]
    for expert in experts:
        own = slice(expert * width, (expert + 1) * width)
        hidden = gelu_tanh(linear(weights["ffn.fc1.weight"][own], weights["ffn.fc1.bias"][own], u))
        y = y + weights["ffn.fc2.weight"][:, own] @ hidden
    return y


def dense_block(weights: Weights, x: Tensor, cond: Tensor, cache: Cache | None = None) -> Tensor:
    """Return the output `[R, L, C]` of one scale `x` `[R, L, C]`, and append its keys and values to the cache."""
    weights, x, cond = in_float64(weights), x.double(), cond.double()
    cache = [[] for _ in x] if cache is None else cache
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation(weights, cond[row])
        projected = [query_key_value(weights, modulate(token, scale1, shift1)) for token in x[row]]
        cache[row].extend((k, v) for _, k, v in projected)
        seen = stacked(cache[row])
        for i, (q, _, _) in enumerate(projected):
            token = x[row, i] + gamma1 * attention(weights, q, seen)
            out[row, i] = token + gamma2 * dense_ffn(weights, modulate(token, scale2, shift2))
    return out


def choose_tokens(
    gates: Gates, active: Active, x: Tensor, fixed: Chosen | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the kept tokens and scores of every row of `x` `[R, L, C]`."""
    weight, bias = gates.selector_weight.double(), gates.selector_bias.double()
    scores = [[linear(weight, bias, layer_norm(token)).item() for token in row] for row in x]
    if fixed is not None:
        return fixed.tokens, scores
    kept = [highest(row, active.keep) for row in scores]
    if active.share_guidance:
        conditional = kept[: len(kept) // 2]
        kept = conditional + conditional
    return kept, scores


def actvar_block(
    weights: Weights,
    gates: Gates,
    active: Active,
    x: Tensor,
    cond: Tensor,
    cache: Cache | None = None,
    fixed: Chosen | None = None,
) -> tuple[Tensor, Chosen]:
    """Return the output of one active scale `x` `[R, L, C]`, and what was chosen.

    The cache grows by K or, with kv "all", by L rows.

    Args:
        fixed: tokens and experts to take instead of the highest ones.
    """
    weights, x, cond = in_float64(weights), x.double(), cond.double()
    cache = [[] for _ in x] if cache is None else cache
    chosen = Chosen()
    chosen.tokens, chosen.scores = choose_tokens(gates, active, x, fixed)
    out = x.clone()
    for row in range(x.shape[0]):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation(weights, cond[row])
        kept = chosen.tokens[row]
        projected = [query_key_value(weights, modulate(token, scale1, shift1)) for token in x[row]]
        attended = kept if active.kv == "compact" else range(x.shape[1])
        cache[row].extend(projected[i][1:] for i in attended)
        seen = stacked(cache[row])
        routed = _RoutedRow(gates, active, chosen, fixed)
        for i in kept:
            token = x[row, i] + gamma1 * attention(weights, projected[i][0], seen)
            out[row, i] = token + gamma2 * routed.ffn(weights, modulate(token, scale2, shift2))
    return out, chosen


def teacher_forced_block(
    weights: Weights,
    gates: Gates | None,
    lengths: Sequence[int],
    actives: Mapping[int, Active],
    x: Tensor,
    cond: Tensor,
    fixed: Mapping[int, Chosen] | None = None,
) -> tuple[Tensor, dict[int, Chosen]]:
    """Return the output of all scales `x` `[R, sum of lengths, C]` at once, and what was chosen.

    A query sees its own scale and earlier ones, without the rows that an active scale dropped.

    Args:
        gates: None where no scale is active.
        lengths: tokens of every scale.
        actives: by scale, the active ones.
        fixed: by active scale, tokens and experts to take instead of the highest ones.
    """
    weights, x, cond = in_float64(weights), x.double(), cond.double()
    starts = [sum(lengths[:scale]) for scale in range(len(lengths))]
    chosen = {scale: Chosen() for scale in actives}
    for scale, active in actives.items():
        segment = x[:, starts[scale] : starts[scale] + lengths[scale]]
        chosen[scale].tokens, chosen[scale].scores = choose_tokens(gates, active, segment, fixed and fixed[scale])

    out = x.clone()
    for row in range(x.shape[0]):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation(weights, cond[row])
        projected = [query_key_value(weights, modulate(token, scale1, shift1)) for token in x[row]]
        attended: list[KeyValue] = []
        for scale, length in enumerate(lengths):
            start, active = starts[scale], actives.get(scale)
            kept = range(length) if active is None else chosen[scale].tokens[row]
            visible = range(length) if active is None or active.kv == "all" else kept
            attended.extend(projected[start + i][1:] for i in visible)
            seen = stacked(attended)
            routed = None if active is None else _RoutedRow(gates, active, chosen[scale], fixed and fixed[scale])
            for i in kept:
                token = x[row, start + i] + gamma1 * attention(weights, projected[start + i][0], seen)
                u = modulate(token, scale2, shift2)
                y = dense_ffn(weights, u) if routed is None else routed.ffn(weights, u)
                out[row, start + i] = token + gamma2 * y
    return out, chosen


class _RoutedRow:
    """Run the FFN of one row's kept tokens, in their order, at an active scale, and write down what was chosen."""

    def __init__(self, gates: Gates, active: Active, chosen: Chosen, fixed: Chosen | None):
        self.gates, self.active, self.chosen = gates, active, chosen
        self.fixed = None if fixed is None else fixed.experts[len(chosen.experts)]
        chosen.experts.append([])
        chosen.logits.append([])

    def ffn(self, weights: Weights, u: Tensor) -> Tensor:
        logits = linear(self.gates.router_weight.double(), self.gates.router_bias.double(), u).tolist()
        experts = highest(logits, self.active.experts)
        if self.fixed is not None:
            experts = self.fixed[len(self.chosen.experts[-1])]
        self.chosen.experts[-1].append(experts)
        self.chosen.logits[-1].append(logits)
        return expert_ffn(weights, u, experts, len(logits))
