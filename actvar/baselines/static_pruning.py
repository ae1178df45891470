"""Static pruning of the FFN: the same hidden units are left out for every token of the last scales.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, for both scores. Adapted:
whole hidden units are left out, not single weights, so that smaller matrices save time; and the weights may be trained
afterwards, as ActVAR's are: by `fix_experts` static pruning is an ActVAR whose router chooses the same experts for all.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from actvar.baselines.replacing_methods import expect_var, with_forwards
from actvar.baselines.sublayers import scale_at
from actvar.config import DENSE, share_of
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import patched_silently, unpatched
from actvar.patching.weight_override import replace_parameters, tuned_parameters
from actvar.sampling.token_maps import sampled_inputs
from actvar.sparse.gates import update
from actvar.sparse.schedule import build_schedule
from actvar.sparse.state import shared_state

IMAGES, BATCH = 16, 8
# one expert, since the kernel pads every expert's units to the processor's vectors
ONE_EXPERT = replace(DENSE, num_experts=1)


@contextmanager
def static_pruning(
    var: nn.Module, units: Sequence[torch.Tensor], scales: Sequence[int] = (-2, -1)
) -> Iterator[nn.Module]:
    """At `scales` each block's FFN has only the hidden units `units` `[m]` int64 of that block: smaller matrices.

    Raises:
        TypeError: a model of another kind.
        ValueError: not one tensor of units per block.
    """
    expect_var(var)
    if len(units) != len(var.blocks):
        raise ValueError(f"units: expected those of each of {len(var.blocks)} blocks, got {len(units)} tensors")
    with patched_silently(var, ONE_EXPERT, None), _smaller_ffns(var, units, scales):
        yield var


@contextmanager
def trained_static_pruning(var: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """`static_pruning` with the units, scales and changed weights of an adapter that was trained from `fix_experts`;
    results are those of the model patched with it, to rounding.

    Raises:
        TypeError: a model of another kind.
        ValueError: the adapter selects tokens, or its router does not choose the same experts for every token.
        FileNotFoundError, AdapterError: as `actvar.load_adapter`.
    """
    expect_var(var)
    config = read_adapter_config(adapter)
    rates = f"token_rates {config.token_rates} and ffn_rate {config.ffn_rate}"
    _expect_static(set(config.token_rates) == {1.0} and isinstance(config.ffn_rate, float), adapter, rates)
    with patched_silently(var, config, adapter):
        gates = [block.actvar for block in var.blocks]
        fixed = all(not (g.router.weight.any() or (g.router.bias.diff() >= 0).any()) for g in gates)
        _expect_static(fixed, adapter, "routers whose choice is not the first experts for every token")
        orders, weights = [g.places.clone() for g in gates], tuned_parameters(var)
    units = share_of(config.ffn_rate, config.num_experts) * (len(orders[0]) // config.num_experts)
    kept = torch.arange(units, device="cpu")
    with patched_silently(var, replace(config, ffn_rate=1.0, num_experts=1, always_sparse=False), None):
        for block, order in zip(var.blocks, orders, strict=True):
            update(block, order)
        replace_parameters(var, weights)
        with _smaller_ffns(var, [kept] * len(orders), config.scales):
            yield var


def _expect_static(is_static: bool, adapter: str | Path, found: str) -> None:
    if not is_static:
        raise ValueError(
            f"{adapter}: expected an adapter of static pruning, with token rates of 1, one ffn_rate and routers as "
            f"actvar.baselines.static_pruning.fix_experts makes them, got {found}; sample with this one by "
            "actvar.patched, or train another from fix_experts"
        )


@contextmanager
def _smaller_ffns(var: nn.Module, units: Sequence[torch.Tensor], scales: Sequence[int]) -> Iterator[None]:
    """On a patched model whose rates are 1: at `scales` each block's FFN is one of `units`, counted as they lie."""
    chosen = {range(len(var.patch_nums))[scale] for scale in scales}

    def forward_of(block: nn.Module):
        whole, part = block.ffn, _pruned(block.ffn, units[block.actvar.block_index])

        def forward(self, x, cond_BD, attn_bias=None):
            if scale_at(self, x).index not in chosen:
                return type(self).forward(self, x, cond_BD, attn_bias)
            self.ffn = part
            try:
                return type(self).forward(self, x, cond_BD, attn_bias)
            finally:
                self.ffn = whole

        return forward

    with with_forwards(var.blocks, forward_of):
        yield


def fix_experts(var: nn.Module, units: Sequence[torch.Tensor]) -> None:
    """Static pruning as gates of a patched model, in place, so that it can be trained: at every scale the first experts
    are on for all tokens. They hold the first of the hidden units `units` `[m]` int64 of their block.

    Raises:
        ValueError: the model is not patched, or `units` are not different ones in each block, at least as many as its
            experts that are on hold at most.
    """
    num_experts = shared_state(var).config.num_experts
    hidden = var.blocks[0].ffn.fc1.out_features
    most = [max([s.experts for s in block.actvar.schedule if s.route] or [num_experts]) for block in var.blocks]
    expected, found = [m * (hidden // num_experts) for m in most], [len(of_block.unique()) for of_block in units]
    different = found == [len(of_block) for of_block in units]
    if len(found) != len(expected) or not different or any(map(operator.lt, found, expected)):
        raise ValueError(f"units: expected {expected} or more different ones in the blocks, got {found}")
    for block, of_block in zip(var.blocks, units, strict=True):
        router, kept = block.actvar.router, of_block.cpu()
        is_other = torch.ones(hidden, dtype=torch.bool, device="cpu").index_fill_(0, kept, False)
        others = is_other.nonzero().flatten()
        bias = -torch.arange(len(router.bias), dtype=router.bias.dtype, device=router.bias.device)
        values = {router.weight: torch.zeros_like(router.weight), router.bias: bias}
        update(block, torch.cat((kept, others)), values)


def magnitude_units(var: nn.Module, rate: float) -> list[torch.Tensor]:
    """Per block the `rate` of hidden units with the largest `|w1_i| |w2_i|`, largest first: the norms of the weights
    that go in and of those that go out."""
    with unpatched(var):
        norms = [block.ffn.fc1.weight.norm(dim=1) * block.ffn.fc2.weight.norm(dim=0) for block in var.blocks]
    return [_largest(of_block, rate) for of_block in norms]


@torch.no_grad()
def wanda_units(var: nn.Module, rate: float, scales: Sequence[int] = (-2, -1), seed: int = 0) -> list[torch.Tensor]:
    """Per block the `rate` of hidden units with the largest `|w2_i| |h_i|`, largest first: Wanda's `|W| |x|` of fc2,
    summed over its rows, with the norm of each unit over tokens of `scales` that the dense model samples itself."""
    with unpatched(var):
        batches = sampled_inputs(var, IMAGES, BATCH, seed)
        spans = [build_schedule(DENSE, var.patch_nums)[scale] for scale in scales]
        energy = [block.ffn.fc1.weight.new_zeros(block.ffn.fc1.out_features) for block in var.blocks]

        def add(index: int, hidden: torch.Tensor) -> None:
            for span in spans:
                energy[index] += hidden[:, span.start : span.start + span.tokens].square().sum(dim=(0, 1))

        handles = [
            block.ffn.fc2.register_forward_pre_hook(lambda _, arguments, index=index: add(index, arguments[0]))
            for index, block in enumerate(var.blocks)
        ]
        try:
            for labels, inputs in batches:
                rows = torch.cat((labels, torch.full_like(labels, var.num_classes)))
                var(rows, inputs.repeat(2, 1, 1))
        finally:
            for handle in handles:
                handle.remove()
        norms = [
            block.ffn.fc2.weight.norm(dim=0) * total.sqrt() for block, total in zip(var.blocks, energy, strict=True)
        ]
    return [_largest(of_block, rate) for of_block in norms]


SCORES = {"magnitude": magnitude_units, "wanda": wanda_units}
"""Functions of a model and the rate that choose the units which stay."""


def _largest(values: torch.Tensor, rate: float) -> torch.Tensor:
    return values.sort(descending=True, stable=True).indices[: share_of(rate, len(values))]


def _pruned(ffn: nn.Module, units: torch.Tensor) -> nn.Module:
    """The FFN with some of its hidden units, in memory of its own."""
    small = copy.deepcopy(ffn).requires_grad_(False)
    small.fc1.weight, small.fc1.bias = nn.Parameter(ffn.fc1.weight[units]), nn.Parameter(ffn.fc1.bias[units])
    small.fc2.weight = nn.Parameter(ffn.fc2.weight[:, units].contiguous())
    small.fc1.out_features = small.fc2.in_features = len(units)
    return small.requires_grad_(False)
