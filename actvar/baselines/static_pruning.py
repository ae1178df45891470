"""Static pruning of the FFN: the same hidden units are left out for every token of the last scales.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, for both scores. Adapted:
whole hidden units are left out, not single weights, so that smaller matrices save time. The weights may be trained
afterwards like those of ActVAR: `fix_experts` makes a router that chooses the same experts for all tokens.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.baselines.replacing_methods import expect_var, with_forwards
from actvar.baselines.sublayers import scale_at
from actvar.config import DENSE, share_of
from actvar.families import blocks_of, family_of
from actvar.patching.adapter import read_adapter_config
from actvar.patching.patch import patched_silently, unpatched
from actvar.sampling.token_maps import sampled_inputs
from actvar.sparse.block_state import set_order_and_gates
from actvar.sparse.schedule import build_schedule
from actvar.sparse.state import patch_state

IMAGES, BATCH = 16, 8
# With more experts the kernel would pad the units of each to the processor's vectors.
ONE_EXPERT = replace(DENSE, num_experts=1)


@contextmanager
def static_pruning(
    var: nn.Module, units: Sequence[torch.Tensor], scales: Sequence[int] = (-2, -1)
) -> Iterator[nn.Module]:
    """Leave each block's FFN at `scales` only the given hidden units, in smaller matrices.

    Args:
        var: the dense model.
        units: a tensor `[m]` int64 of hidden units per block.
        scales: numbers of scales, counted from the end where negative.

    Raises:
        TypeError: a model of another kind.
        ValueError: not one tensor of units per block.
    """
    count = len(blocks_of(expect_var(var)))
    if len(units) != count:
        raise ValueError(f"units: expected those of each of {count} blocks, got {len(units)} tensors")
    with patched_silently(var, ONE_EXPERT, None), _smaller_ffns(var, units, scales):
        yield var


@contextmanager
def trained_static_pruning(var: nn.Module, adapter: str | Path) -> Iterator[nn.Module]:
    """Prune statically with the units, scales and changed weights of an adapter that was trained from `fix_experts`.

    Results are those of the model patched with that adapter, to rounding.

    Args:
        var: the dense model.
        adapter: the file.

    Raises:
        TypeError: a model of another kind.
        ValueError: the adapter selects tokens, or its router does not choose the same experts for every token.
        FileNotFoundError, AdapterError: as `actvar.load_adapter`.
    """
    expect_var(var)
    config = read_adapter_config(adapter)
    rates = f"token_rates {config.token_rates} and ffn_rate {config.ffn_rate}"
    if set(config.token_rates) != {1.0} or not isinstance(config.ffn_rate, float):
        raise _not_static(adapter, rates)
    with patched_silently(var, config, adapter):
        blocks: list[Any] = blocks_of(var)
        gates = [block.actvar for block in blocks]
        if any(g.router.weight.any() or (g.router.bias.diff() >= 0).any() for g in gates):
            raise _not_static(adapter, "routers whose choice is not the first experts for every token")
    with patched_silently(var, replace(config, static_experts=True, always_sparse=False), adapter):
        yield var


def _not_static(adapter: str | Path, found: str) -> ValueError:
    return ValueError(
        f"{adapter}: expected an adapter of static pruning, with token rates of 1, one ffn_rate and routers as "
        f"actvar.baselines.static_pruning.fix_experts makes them, got {found}; sample with this one by "
        "actvar.patched, or train another from fix_experts"
    )


@contextmanager
def _smaller_ffns(var: nn.Module, units: Sequence[torch.Tensor], scales: Sequence[int]) -> Iterator[None]:
    """Give each block of a model patched with rates of 1 an FFN of `units` at `scales`.

    Units are counted in the order in which the block has them.
    """
    family = family_of(var)
    chosen = {range(len(family.maps(var)))[scale] for scale in scales}

    def forward_of(block: Any):
        whole, part = family.ffn_module(block), family.pruned_ffn(block, units[block.actvar.block_index])

        def forward(self, *args, **kwargs):
            if scale_at(self, family.block_call(*args, **kwargs)).index not in chosen:
                return type(self).forward(self, *args, **kwargs)
            family.set_ffn_module(self, part)
            try:
                return type(self).forward(self, *args, **kwargs)
            finally:
                family.set_ffn_module(self, whole)

        return forward

    with with_forwards(blocks_of(var), forward_of):
        yield


def fix_experts(var: nn.Module, units: Sequence[torch.Tensor]) -> None:
    """Turn the gates of a patched model, in place, into static pruning, so that it can be trained.

    At every scale the first experts are on for all tokens. These experts hold the first of the block's `units`.

    Args:
        var: a patched model.
        units: a tensor `[m]` int64 of hidden units per block.

    Raises:
        ValueError: the model is not patched; or `units` of a block repeat, or are fewer than its active experts hold.
    """
    num_experts = patch_state(var).config.num_experts
    blocks: list[Any] = blocks_of(var)
    hidden = family_of(var).sizes(var).hidden
    most = [max([s.experts for s in block.actvar.schedule if s.route or s.static] or [num_experts]) for block in blocks]
    expected, found = [m * (hidden // num_experts) for m in most], [len(block_units.unique()) for block_units in units]
    different = found == [len(block_units) for block_units in units]
    if len(found) != len(expected) or not different or any(map(operator.lt, found, expected)):
        raise ValueError(f"units: expected {expected} or more different ones in the blocks, got {found}")
    for block, block_units in zip(blocks, units, strict=True):
        router, kept = block.actvar.router, block_units.cpu()
        is_other = torch.ones(hidden, dtype=torch.bool, device="cpu").index_fill_(0, kept, False)
        others = is_other.nonzero().flatten()
        bias = -torch.arange(len(router.bias), dtype=router.bias.dtype, device=router.bias.device)
        values = {router.weight: torch.zeros_like(router.weight), router.bias: bias}
        set_order_and_gates(block, torch.cat((kept, others)), values)


def magnitude_units(var: nn.Module, rate: float) -> list[torch.Tensor]:
    """Return per block the `rate` of hidden units with the largest `|w1_i| |w2_i|`, largest first.

    The factors are the norms of the unit's ingoing and outgoing weights.

    Args:
        var: a VAR; a patch does not count.
        rate: share of the hidden units, above 0 and at most 1.

    Returns:
        A tensor `[m]` int64 per block.
    """
    with unpatched(var):
        weights = [family_of(var).ffn_weights(block) for block in blocks_of(var)]
        norms = [into.norm(dim=1) * out.norm(dim=0) for into, _, out, _ in weights]
    return [_largest(block_norms, rate) for block_norms in norms]


@torch.no_grad()
def wanda_units(var: nn.Module, rate: float, scales: Sequence[int] = (-2, -1), seed: int = 0) -> list[torch.Tensor]:
    """Return per block the `rate` of hidden units with the largest `|w2_i| |h_i|`, largest first.

    Wanda scores a weight of the second layer by `|W| |x|`. Here that is summed over the layer's rows, with the norm of
    each unit over tokens of `scales` that the dense model samples itself.

    Args:
        var: a VAR; a patch does not count.
        rate: share of the hidden units, above 0 and at most 1.
        scales: numbers of scales, counted from the end where negative.
        seed: of the samples.

    Returns:
        A tensor `[m]` int64 per block.
    """
    with unpatched(var):
        family, blocks = family_of(var), blocks_of(var)
        batches = sampled_inputs(var, IMAGES, BATCH, seed)
        spans = [build_schedule(DENSE, family.maps(var))[scale] for scale in scales]
        weights = [family.ffn_weights(block) for block in blocks]
        energy = [bias.new_zeros(len(bias)) for _, bias, _, _ in weights]

        def add(index: int, _ffn: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            hidden = F.gelu(F.linear(arguments[0], *weights[index][:2]), approximate="tanh")
            for span in spans:
                energy[index] += hidden[:, span.start : span.start + span.tokens].square().sum(dim=(0, 1))

        handles = [
            family.ffn_module(block).register_forward_pre_hook(functools.partial(add, index))
            for index, block in enumerate(blocks)
        ]
        try:
            for labels, inputs in batches:
                family.predicted(var, family.with_unconditional(var, labels), inputs.repeat(2, 1, 1))
        finally:
            for handle in handles:
                handle.remove()
        norms = [out.norm(dim=0) * total.sqrt() for (_, _, out, _), total in zip(weights, energy, strict=True)]
    return [_largest(block_norms, rate) for block_norms in norms]


SCORES = {"magnitude": magnitude_units, "wanda": wanda_units}
"""Functions of a model and the rate by name; they choose the units that stay."""


def _largest(values: torch.Tensor, rate: float) -> torch.Tensor:
    return values.sort(descending=True, stable=True).indices[: share_of(rate, len(values))]
