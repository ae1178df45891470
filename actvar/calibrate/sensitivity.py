"""What leaving out tokens or experts in one block does to the logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from actvar.config import ActVARConfig
from actvar.evaluate.divergence import token_divergence
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.sparse.schedule import build_schedule

TOKEN_RATE, FFN_RATE = 0.75, 0.5
"""Rates that are tried, one of them below 1 in one block."""


@torch.no_grad()
def divergence_per_block(
    var: nn.Module, config: ActVARConfig, labels: torch.Tensor, inputs: torch.Tensor
) -> list[dict[int, tuple[float, float]]]:
    """KL to the dense logits, mean over a scale's tokens, when one block alone is sparse: per block, by scale index,
    with `TOKEN_RATE` and with `FFN_RATE`.

    Args:
        var: a patched model with fitted gates; its schedules are put back.
        config: the one it is patched with.
        labels, inputs: `[B]` and `[B, L - first_l, Cvae]` for teacher forcing.
    """
    family, blocks = family_of(var), blocks_of(var)
    before = [block.actvar.schedule for block in blocks]
    ones = (1.0,) * len(config.scales)
    dense = replace(config, token_rates=ones, ffn_rate=1.0, always_sparse=False)
    probes = replace(dense, token_rates=(TOKEN_RATE,) * len(ones)), replace(dense, ffn_rate=FFN_RATE)
    schedules = [build_schedule(c, family.maps(var)) for c in (dense, *probes)]
    call, head_cond = family.embedded(var, labels, inputs)

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
        for index, block in enumerate(tqdm(blocks, desc="sensitivity")):
            of_probes = []
            for schedule in schedules[1:]:
                block.actvar.schedule = schedule
                of_probes.append(token_divergence(expected, run(index, call)).mean(dim=0))
            block.actvar.schedule = schedules[0]
            call = after(block, call)
            scales = [schedules[0][scale] for scale in config.scales]
            found.append(
                {
                    scale.index: tuple(kl[scale.start : scale.start + scale.tokens].mean().item() for kl in of_probes)
                    for scale in scales
                }
            )
        return found
    finally:
        for block, schedule in zip(blocks, before, strict=True):
            block.actvar.schedule = schedule
