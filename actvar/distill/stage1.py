"""Stage 1: train selectors and routers, with everything else frozen, along the patched model's own trajectory."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.distill.losses import (
    balance_loss,
    distillation_loss,
    expert_distances,
    router_target,
    selector_target,
)
from actvar.distill.stage import Stage
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.families.conditions import Conditions
from actvar.patching.adapter import gate_parameters
from actvar.sparse.contexts import record
from actvar.sparse.record import BlockRecord
from actvar.sparse.state import patch_state

DISTILLATION_WEIGHT, BALANCE_WEIGHT = 0.05, 0.01


class Stage1(Stage):
    """Loss of a batch as a module, so that it can be trained in several processes.

    Args:
        var: a patched model; the selectors and routers that its rates use become the only trainable parameters.

    Raises:
        ValueError: the model is not patched, or its rates are all 1.
    """

    def __init__(self, var: nn.Module):
        super().__init__()
        schedule = patch_state(var).schedule
        used = {"selector": any(s.select for s in schedule), "router": any(s.route for s in schedule)}
        if not any(used.values()):
            raise ValueError("expected a rate below 1 at some scale: there is no selector or router to train")
        self.var, self.family = var, family_of(var)
        var.requires_grad_(False)
        for name, parameter in gate_parameters(var).items():
            parameter.requires_grad_(used[name.split(".")[2]])

    def forward(self, conditions: Conditions, inputs: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return scalar losses: `loss` (Eq. 19) and its parts `cls`, `router`, `selector`, `balance`.

        All parts except `cls` are averaged over the blocks.

        Args:
            conditions: classes `[B]` int64, or texts.
            inputs: `[B, L - first_l, Cvae]` float32, see `VectorQuantizer.teacher_input`.
            tokens: the true token maps, `[B, L]` of an integer dtype.

        Raises:
            RuntimeError: blocks run under reentrant activation checkpointing, which hides the gates from the loss.
        """
        with record(self.var) as records:
            logits = self.family.predicted(self.var, conditions, inputs)
        _expect_gradients(records)
        parts = {"router": [], "selector": [], "balance": []}
        blocks = blocks_of(self.var)
        for index, block_records in groupby(records, key=lambda r: r.block):
            for name, value in self._block_losses(blocks[index], list(block_records)).items():
                parts[name].append(value)
        means = {name: torch.stack(values).mean() for name, values in parts.items()}
        cls = F.cross_entropy(logits.flatten(0, -2), tokens.flatten().long())
        distillation = DISTILLATION_WEIGHT * (means["router"] + means["selector"])
        return {"loss": cls + distillation + BALANCE_WEIGHT * means["balance"], "cls": cls, **means}

    def _block_losses(self, block: nn.Module, records: list[BlockRecord]) -> dict[str, torch.Tensor]:
        """Return router and selector loss of one block, and the sum of both gates' balance losses.

        Each is averaged over the scales where its gate runs.
        """
        call = records[0].call
        if call is None:
            raise ValueError("expected records of a teacher-forced pass, got some of a sample")
        change = self._dense_change(block, call)
        router, selector, balance_r, balance_s = [], [], [], []
        with torch.autocast(change.device.type, enabled=False):
            for r in records:
                if r.logits is not None and r.mask is not None:
                    logits, mask = r.logits.flatten(0, -2), r.mask.flatten(0, -2)
                    target = self._router_target(block, r, num_experts=logits.shape[-1])
                    router.append(distillation_loss(target, logits))
                    balance_r.append(balance_loss(logits, mask))
                if r.scores is not None and r.index is not None:
                    scale_change = change[:, r.scale.start : r.scale.start + r.scale.tokens]
                    selector.append(distillation_loss(selector_target(scale_change, r.scale.keep), r.scores))
                    kept = torch.zeros_like(r.scores, dtype=torch.bool).scatter_(1, r.index, True)
                    balance_s.append(balance_loss(r.scores, kept))

        def mean(losses: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(losses).mean() if losses else change.new_zeros(())

        return {"router": mean(router), "selector": mean(selector), "balance": mean(balance_r) + mean(balance_s)}

    @torch.no_grad()
    def _dense_change(self, block: Any, call: BlockCall) -> torch.Tensor:
        """Return `||block(x)_i - x_i||_2` `[R, L_all]` float32 of the dense block at the student's input."""
        return (block.dense_forward(call) - call.x).float().norm(dim=-1)

    @torch.no_grad()
    def _router_target(self, block: nn.Module, r: BlockRecord, num_experts: int) -> torch.Tensor:
        fc1_weight, fc1_bias, fc2_weight, _ = (w.float() for w in self.family.ffn_weights(block))
        u = r.u.float().flatten(0, -2)
        distances = expert_distances(u, fc1_weight, fc1_bias, fc2_weight, num_experts)
        return router_target(distances, r.scale.experts)


def _expect_gradients(records: list[BlockRecord]) -> None:
    """Raise RuntimeError if gradients are wanted and no gradient leads from the loss to a gate."""
    outputs = [output for r in records for output in (r.scores, r.logits) if output is not None]
    if torch.is_grad_enabled() and not all(output.requires_grad for output in outputs):
        raise RuntimeError(
            "expected scores and logits of the gates with gradients, got some without, as blocks under "
            "torch.utils.checkpoint with use_reentrant=True have them; use use_reentrant=False"
        )
