"""Static pruning of the FFN: the same hidden units are left out for every token of the last scales.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024, for both scores. Adapted:
whole hidden units are left out, not single weights, so that smaller matrices save time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from actvar.baselines.replacing_methods import expect_var, with_forwards
from actvar.baselines.sublayers import scale_at
from actvar.calibrate.samples import sampled_inputs
from actvar.config import share_of
from actvar.patch import DENSE, patched_silently, unpatched
from actvar.schedule import build_schedule

IMAGES, BATCH = 16, 8


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

    # one expert, since the kernel pads every expert's units to the processor's vectors
    with patched_silently(var, replace(DENSE, num_experts=1), None), with_forwards(var.blocks, forward_of):
        yield var


def magnitude_units(var: nn.Module, rate: float) -> list[torch.Tensor]:
    """Per block the `rate` of hidden units with the largest `|w1_i| |w2_i|`, ascending: the norms of the weights that
    go in and of those that go out."""
    with unpatched(var):
        norms = [block.ffn.fc1.weight.norm(dim=1) * block.ffn.fc2.weight.norm(dim=0) for block in var.blocks]
    return [_largest(of_block, rate) for of_block in norms]


@torch.no_grad()
def wanda_units(var: nn.Module, rate: float, scales: Sequence[int] = (-2, -1), seed: int = 0) -> list[torch.Tensor]:
    """Per block the `rate` of hidden units with the largest `|w2_i| |h_i|`, ascending: Wanda's `|W| |x|` of fc2, summed
    over its rows, with the norm of each unit over tokens of `scales` that the dense model samples itself."""
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


def _largest(values: torch.Tensor, rate: float) -> torch.Tensor:
    return values.topk(share_of(rate, len(values))).indices.sort().values


def _pruned(ffn: nn.Module, units: torch.Tensor) -> nn.Module:
    """The FFN with some of its hidden units, in memory of its own."""
    small = copy.deepcopy(ffn).requires_grad_(False)
    small.fc1.weight, small.fc1.bias = nn.Parameter(ffn.fc1.weight[units]), nn.Parameter(ffn.fc1.bias[units])
    small.fc2.weight = nn.Parameter(ffn.fc2.weight[:, units].contiguous())
    small.fc1.out_features = small.fc2.in_features = len(units)
    return small.requires_grad_(False)
