"""Selector, router and order of hidden units of one block, from the dense block's own activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.calibrate.clusters import expert_order
from actvar.calibrate.curves import Curves, expert_outputs
from actvar.calibrate.ridge import NormalEquations, fitted
from actvar.families.base import BlockCall, Family
from actvar.sparse.schedule import Scale
from actvar_kernels.constants import NORM_EPS

CLUSTERED_TOKENS = 4096
MEASURED_TOKENS = 1024
HELD_OUT = 4
"""Every fourth batch is measured instead of fitted to."""


class BlockFit(NamedTuple):
    """`selector` weight `[1, C]`; `router` weight `[N, C]` and bias `[N]`; `order` `[D]`, or None; `curves` by scale
    index; `after`: the residual stream behind the dense block."""

    selector: torch.Tensor
    router: tuple[torch.Tensor, torch.Tensor]
    order: torch.Tensor | None
    curves: dict[int, Curves]
    after: list[BlockCall]


class _Dense(NamedTuple):
    """A batch through the dense block: its output `y` and the FFN's input `u`, both `[R, L, C]`."""

    y: torch.Tensor
    u: torch.Tensor


@torch.no_grad()
def fit_block(
    family: Family, block: nn.Module, stream: list[BlockCall], scales: list[Scale], num_experts: int, cluster: bool
) -> BlockFit:
    """Fit one unpatched block in closed form.

    Selector: ridge regression from `LN(x)` to `|block(x) - x|`, divided by its mean over the row, both centred over the
    row, since tokens compete within it. Router: from the FFN's input to `|gamma * E_e|`, divided by its mean over e.

    Args:
        stream: calls of the block by batch; every fourth, from the last one on, is held out.
        scales: the active ones, of which tokens and experts may be left out.
        cluster: reorder hidden units by what they do for the same tokens; otherwise experts are contiguous.
    """
    dense = [_dense(family, block, batch) for batch in stream]
    selector = _selector(stream, dense, scales)
    weights = [weight.float() for weight in family.ffn_weights(block)]
    order = None
    if cluster:
        order = expert_order(_unit_energy(family, block, stream, dense, scales, weights), num_experts, num_experts // 2)
        weights = [weights[0][order], weights[1][order], weights[2][:, order], weights[3]]
    router = _router(family, block, stream, dense, scales, weights, num_experts)
    curves = {scale.index: Curves(scale.tokens, num_experts) for scale in scales}
    for number, (batch, of_dense) in enumerate(zip(stream, dense, strict=True)):
        if _is_held_out(number, len(stream)):
            for scale in scales:
                _measure(curves[scale.index], family, block, batch, of_dense, scale, selector, router, weights)
    after = [batch._replace(x=of_dense.y) for batch, of_dense in zip(stream, dense, strict=True)]
    return BlockFit(selector, router, order, curves, after)


def _is_held_out(number: int, count: int) -> bool:
    return (count - 1 - number) % HELD_OUT == 0


def _dense(family: Family, block: nn.Module, batch: BlockCall) -> _Dense:
    inputs: list[torch.Tensor] = []
    ffn = family.ffn_module(block)
    handle = ffn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        return _Dense(block(**family.block_arguments(batch)), inputs[0])
    finally:
        handle.remove()


def _of(scale: Scale, tensor: torch.Tensor) -> torch.Tensor:
    """The scale's part `[R, L, C]` of `[R, L_all, C]` in float32."""
    return tensor[:, scale.start : scale.start + scale.tokens].float()


def _regression(
    stream: list[BlockCall], dense: list[_Dense], samples: Callable, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of `samples(batch, of_dense)`, which yields pairs of `[T, C]` and `[T, outputs]`."""
    x = stream[0].x
    train, held_out = (NormalEquations(x.shape[2], outputs, x.device) for _ in range(2))
    for number, (batch, of_dense) in enumerate(zip(stream, dense, strict=True)):
        for features, targets in samples(batch, of_dense):
            (held_out if _is_held_out(number, len(stream)) else train).add(features, targets)
    return fitted(train, held_out)


def _selector(stream: list[BlockCall], dense: list[_Dense], scales: list[Scale]) -> torch.Tensor:
    def samples(batch: BlockCall, of_dense: _Dense):
        for scale in scales:
            x = _of(scale, batch.x)
            features, target = _normalized(x), (_of(scale, of_dense.y) - x).norm(dim=-1)
            target = target / target.mean(dim=1, keepdim=True)
            yield (features - features.mean(dim=1, keepdim=True)).flatten(0, 1), (target - 1).flatten().unsqueeze(1)

    return _regression(stream, dense, samples, 1)[0]


def _router(
    family: Family,
    block: nn.Module,
    stream: list[BlockCall],
    dense: list[_Dense],
    scales: list[Scale],
    weights: list[torch.Tensor],
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    def samples(batch: BlockCall, of_dense: _Dense):
        for scale in scales:
            u, gamma = _ffn_inputs(family, block, batch, of_dense, scale)
            outputs = expert_outputs(_hidden(u, weights), weights[2], gamma, num_experts)
            norms = torch.stack([output.norm(dim=-1) for output in outputs], dim=1)
            yield u, norms / norms.mean(dim=1, keepdim=True)

    return _regression(stream, dense, samples, num_experts)


def _unit_energy(
    family: Family,
    block: nn.Module,
    stream: list[BlockCall],
    dense: list[_Dense],
    scales: list[Scale],
    weights: list[torch.Tensor],
) -> torch.Tensor:
    """`h_i^2 |gamma * w2_i|^2` of tokens spread evenly over the samples, each token's divided by its sum, `[T, D]`."""
    total = sum(batch.x.shape[0] for batch in stream) * sum(scale.tokens for scale in scales)
    step = -(-total // CLUSTERED_TOKENS)
    parts, skip = [], 0
    for batch, of_dense in zip(stream, dense, strict=True):
        for scale in scales:
            u, gamma = _ffn_inputs(family, block, batch, of_dense, scale)
            count = len(u)
            u, gamma = u[skip::step], gamma[skip::step]
            skip = (skip - count) % step
            energy = _hidden(u, weights).square() * (gamma.square() @ weights[2].square())
            parts.append(energy / energy.sum(dim=1, keepdim=True))
    return torch.cat(parts)


def _measure(
    curves: Curves,
    family: Family,
    block: nn.Module,
    batch: BlockCall,
    of_dense: _Dense,
    scale: Scale,
    selector: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor],
    weights: list[torch.Tensor],
) -> None:
    x, y = _of(scale, batch.x), _of(scale, of_dense.y)
    curves.add_rows((_normalized(x) * selector[0]).sum(dim=-1), (y - x).norm(dim=-1))
    u, gamma = _ffn_inputs(family, block, batch, of_dense, scale)
    step = -(-len(u) // MEASURED_TOKENS)
    u, gamma = u[::step], gamma[::step]
    curves.add_routed(F.linear(u, *router), _hidden(u, weights), weights[2], gamma)


def _ffn_inputs(
    family: Family, block: nn.Module, batch: BlockCall, of_dense: _Dense, scale: Scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the FFN's input and the AdaLN gate of its output, each `[R * L, C]`."""
    u = _of(scale, of_dense.u)
    gamma = family.modulation(block, batch.cond)[1].float().expand_as(u)
    return u.flatten(0, 1), gamma.flatten(0, 1)


def _hidden(u: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return F.gelu(F.linear(u, weights[0], weights[1]), approximate="tanh")


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
