"""Selector, router and order of hidden units of one block, fitted to the dense block's own activations.

Both fits are ridge regressions. `E_e` is the output of expert e, and `gamma` is the AdaLN gate of the FFN's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from actvar.calibrate.clusters import expert_order
from actvar.calibrate.curves import Curves, expert_outputs
from actvar.calibrate.ridge import NormalEquations, fitted
from actvar.config import ActVARConfig
from actvar.families.base import BlockCall, Family
from actvar.sparse.schedule import Scale
from actvar_kernels.constants import NORM_EPS

CLUSTERED_TOKENS = 4096
MEASURED_TOKENS = 1024
HELD_OUT = 4
"""Every fourth batch is measured instead of fitted to."""


class BlockFit(NamedTuple):
    """One block's gates and their losses.

    Args:
        selector: weight of the selector, `[1, C]`.
        router: weight `[N, C]` and bias `[N]` of the router.
        order: of the hidden units, `[D]` int64; None for their own order.
        curves: losses by scale index.
        after: the residual stream behind the dense block, by batch, each `[R, L_all, C]`.
        static_order: of the hidden units for static pruning, `[D]` int64, the most important ones first.
    """

    selector: torch.Tensor
    router: tuple[torch.Tensor, torch.Tensor]
    order: torch.Tensor | None
    curves: dict[int, Curves]
    after: list[torch.Tensor]
    static_order: torch.Tensor | None = None

    def order_for(self, config: ActVARConfig) -> torch.Tensor | None:
        """Return the order of the hidden units for the kind of experts that a configuration has."""
        return self.static_order if config.static_experts else self.order


class _Batch(NamedTuple):
    """One batch at the dense block.

    Args:
        x: the block's input, `[R, L_all, C]`.
        cond: the condition of its AdaLN.
        y: the block's output, `[R, L_all, C]`.
        u: the FFN's input, `[R, L_all, C]`.
        is_held_out: it is measured instead of fitted to.
    """

    x: torch.Tensor
    cond: Any
    y: torch.Tensor
    u: torch.Tensor
    is_held_out: bool


@torch.no_grad()
def fit_block(
    family: Family,
    block: nn.Module,
    stream: Sequence[Callable[[], BlockCall]],
    scales: list[Scale],
    num_experts: int,
    cluster: bool,
) -> BlockFit:
    """Fit one unpatched block in closed form.

    Args:
        family: of the model.
        block: the block, which is not changed.
        stream: functions that return the call of the block, by batch; every fourth, counted from the last one, is held
            out. Each is called once, and of the call only input and condition are kept.
        scales: the active scales, at which tokens and experts may be left out.
        num_experts: N, a divisor of the hidden units.
        cluster: reorder hidden units so that those of an expert matter for the same tokens; otherwise experts are
            contiguous.
    """
    batches = [
        _dense_batch(family, block, call_of(), is_held_out=(len(stream) - number) % HELD_OUT == 0)
        for number, call_of in enumerate(stream, 1)
    ]
    selector = _selector(batches, scales)
    weights = [weight.float() for weight in family.ffn_weights(block)]
    energy = _unit_energy(family, block, batches, scales, weights)
    static_order = energy.sum(dim=0).argsort(descending=True, stable=True)
    static_weights = _in_order(weights, static_order)
    order = None
    if cluster:
        order = expert_order(energy, num_experts, num_experts // 2)
        weights = _in_order(weights, order)
    router = _router(family, block, batches, scales, weights, num_experts)
    curves = {scale.index: Curves(scale.tokens, num_experts) for scale in scales}
    for batch in batches:
        if batch.is_held_out:
            for scale in scales:
                _measure(curves[scale.index], family, block, batch, scale, selector, router, weights, static_weights)
    return BlockFit(selector, router, order, curves, [batch.y for batch in batches], static_order)


def _in_order(weights: list[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """Return the weights of an FFN with its hidden units in an order `[D]`."""
    return [weights[0][order], weights[1][order], weights[2][:, order], weights[3]]


def _dense_batch(family: Family, block: nn.Module, call: BlockCall, is_held_out: bool) -> _Batch:
    inputs: list[torch.Tensor] = []
    ffn = family.ffn_module(block)
    handle = ffn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        return _Batch(call.x, call.cond, block(**family.block_arguments(call)), inputs[0], is_held_out)
    finally:
        handle.remove()


def _rows_at(scale: Scale, tensor: torch.Tensor) -> torch.Tensor:
    """Return the scale's part `[R, L, C]` float32 of a tensor `[R, L_all, C]`."""
    return tensor[:, scale.start : scale.start + scale.tokens].float()


def _regression(
    batches: list[_Batch], samples: Callable[[_Batch], Iterator[tuple[torch.Tensor, torch.Tensor]]], outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight `[outputs, C]` and bias `[outputs]` of the ridge regression over all batches.

    Args:
        batches: to fit to and held out.
        samples: yields features `[T, C]` and targets `[T, outputs]` of a batch.
        outputs: number of targets of a token.
    """
    x = batches[0].x
    train, held_out = (NormalEquations(x.shape[2], outputs, x.device) for _ in range(2))
    for batch in batches:
        for features, targets in samples(batch):
            (held_out if batch.is_held_out else train).add(features, targets)
    return fitted(train, held_out)


def _selector(batches: list[_Batch], scales: list[Scale]) -> torch.Tensor:
    """Return the selector's weight `[1, C]`, fitted from `LN(x)` to `|block(x) - x|`.

    The target is divided by its mean over the row, and both are centred over the row, since tokens compete within it.
    """

    def samples(batch: _Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for scale in scales:
            x = _rows_at(scale, batch.x)
            features, target = _normalized(x), (_rows_at(scale, batch.y) - x).norm(dim=-1)
            target = target / target.mean(dim=1, keepdim=True)
            yield (features - features.mean(dim=1, keepdim=True)).flatten(0, 1), (target - 1).flatten().unsqueeze(1)

    return _regression(batches, samples, 1)[0]


def _router(
    family: Family,
    block: nn.Module,
    batches: list[_Batch],
    scales: list[Scale],
    weights: list[torch.Tensor],
    num_experts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the router's weight `[N, C]` and bias `[N]`, fitted from the FFN's input to `|gamma * E_e|`.

    The targets of a token are divided by their mean over the experts.
    """

    def samples(batch: _Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for scale in scales:
            u, gamma = _ffn_inputs(family, block, batch, scale)
            outputs = expert_outputs(_hidden(u, weights), weights[2], gamma, num_experts)
            norms = torch.stack([output.norm(dim=-1) for output in outputs], dim=1)
            yield u, norms / norms.mean(dim=1, keepdim=True)

    return _regression(batches, samples, num_experts)


def _unit_energy(
    family: Family, block: nn.Module, batches: list[_Batch], scales: list[Scale], weights: list[torch.Tensor]
) -> torch.Tensor:
    """Return each hidden unit's share in the energy of its token's FFN output, `[T, D]`, where each row sums to 1.

    The energy is `h_i^2 |gamma * w2_i|^2`. The tokens are spread evenly over the samples.
    """
    total = sum(batch.x.shape[0] for batch in batches) * sum(scale.tokens for scale in scales)
    step = -(-total // CLUSTERED_TOKENS)
    parts, skip = [], 0
    for batch in batches:
        for scale in scales:
            u, gamma = _ffn_inputs(family, block, batch, scale)
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
    batch: _Batch,
    scale: Scale,
    selector: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor],
    weights: list[torch.Tensor],
    static_weights: list[torch.Tensor],
) -> None:
    """Add a held-out batch to the curves of a scale; weights are those of the FFN in the order of either experts."""
    x, y = _rows_at(scale, batch.x), _rows_at(scale, batch.y)
    curves.add_rows((_normalized(x) * selector[0]).sum(dim=-1), (y - x).norm(dim=-1))
    u, gamma = _ffn_inputs(family, block, batch, scale)
    step = -(-len(u) // MEASURED_TOKENS)
    u, gamma = u[::step], gamma[::step]
    curves.add_routed(F.linear(u, *router), _hidden(u, weights), weights[2], gamma)
    curves.add_static(_hidden(u, static_weights), static_weights[2], gamma)


def _ffn_inputs(family: Family, block: nn.Module, batch: _Batch, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the FFN's input and the AdaLN gate of its output, each `[R * L, C]` float32."""
    u = _rows_at(scale, batch.u)
    gamma = family.modulation(block, batch.cond)[1].float().expand_as(u)
    return u.flatten(0, 1), gamma.flatten(0, 1)


def _hidden(u: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return F.gelu(F.linear(u, weights[0], weights[1]), approximate="tanh")


def _normalized(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
