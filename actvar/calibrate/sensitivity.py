"""The effect on the logits when one block leaves out tokens or experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.evaluate.divergence import token_divergence
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.families.conditions import Conditions
from actvar.sparse.schedule import build_schedule
from actvar.sparse.state import patch_state
from actvar.utils.progress import progress

TOKEN_RATE, FFN_RATE = 0.75, 0.5
"""Rates that are tried, one of the two in one block at a time."""


@torch.no_grad()
def divergence_per_block(
    var: nn.Module, config: ActVARConfig, conditions: Conditions, inputs: torch.Tensor
) -> list[dict[int, tuple[float, float]]]:
    """Return the KL to the dense logits, mean over a scale's tokens, when one block alone is sparse.

    Args:
        var: a patched model with fitted gates; its schedules are put back.
        config: the one that the model is patched with.
        conditions: of `B` images.
        inputs: of teacher forcing, `[B, L - first_l, Cvae]`.

    Returns:
        Per block, by scale index, the KL with `TOKEN_RATE` and the one with `FFN_RATE`.
    """
    family = family_of(var)
    blocks: list[Any] = blocks_of(var)
    maps = family.maps_of(var, conditions)
    patch_state(var).fit_maps(var, maps)
    before = [block.actvar.schedule for block in blocks]
    dense = config.without_savings()
    probes = replace(dense, token_rates=(TOKEN_RATE,) * len(config.scales)), replace(dense, ffn_rate=FFN_RATE)
    schedules = [build_schedule(c, maps) for c in (dense, *probes)]
    call, head_cond = family.embedded(var, conditions, inputs)

    def after(block: nn.Module, call: BlockCall) -> BlockCall:
        return call._replace(x=block(**family.block_arguments(call)))

    def run(first: int, call: BlockCall) -> torch.Tensor:
        for block in blocks[first:]:
            call = after(block, call)
        return family.logits(var, call.x, head_cond)

    try:
        for block in blocks:
            block.actvar.schedule = schedules[0]
        expected = run(0, call)
        found = []
        for index, block in enumerate(progress(blocks, desc="sensitivity")):
            divergences = []
            for schedule in schedules[1:]:
                block.actvar.schedule = schedule
                divergences.append(token_divergence(expected, run(index, call)).mean(dim=0))
            block.actvar.schedule = schedules[0]
            call = after(block, call)
            scales = [schedules[0][scale] for scale in config.scales]
            by_tokens, by_experts = (
                {scale.index: kl[scale.start : scale.start + scale.tokens].mean().item() for scale in scales}
                for kl in divergences
            )
            found.append({scale.index: (by_tokens[scale.index], by_experts[scale.index]) for scale in scales})
        return found
    finally:
        for block, schedule in zip(blocks, before, strict=True):
            block.actvar.schedule = schedule
