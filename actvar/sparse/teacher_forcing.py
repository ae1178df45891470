"""The ActVAR block over all scales at once, as training sees it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from actvar.families.base import ATTENTION, BlockCall, Rows
from actvar.sparse.passes import Pass, computing_again
from actvar.sparse.record import BlockRecord
from actvar.sparse.schedule import Scale
from actvar.sparse.selection import selected
from actvar_kernels import expert_ffn, normalize_modulate, route_experts, subset_attention


class KeptTokens(NamedTuple):
    """Per scale: `index` `[R, K]` within the scale; `scores` `[R, L]`, or None where nothing is selected."""

    scale: Scale
    index: torch.Tensor
    scores: torch.Tensor | None


def teacher_forced_block(block: nn.Module, call: BlockCall, current: Pass) -> torch.Tensor:
    """Run all scales of a pass at once: `[R, L, C]` -> `[R, L, C]`.

    Rows that a scale dropped are invisible to every later query, as in sampling.

    While a gate is being trained, the kept tokens' updates or the chosen experts' outputs are multiplied by
    `1 + p - stopgrad(p)` (straight-through), p the softmax of its scores; values change by rounding only.

    Raises:
        ValueError: the tokens are not those of all scales, or of the first few.
    """
    shared, family, x = block.actvar.shared, block.actvar.family, call.x
    schedule = _scales_of(block.actvar.schedule, x.shape[1])
    gamma1, gamma2, scale1, scale2, shift1, shift2 = family.modulation(block, call.cond)

    kept = [_select(block, x, scale1, shift1, scale, current) for scale in schedule]
    index = torch.cat([k.index + k.scale.start for k in kept], dim=1)
    at = Rows(0, x.shape[1], index)
    index = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    before = x.gather(1, index)

    u = normalize_modulate(before, scale1, shift1)
    keys_from = normalize_modulate(x, scale1, shift1) if shared.config.kv == "all" else u
    visible = block_causal_mask(schedule, shared.config.kv, u)
    if ATTENTION in block.actvar.called:
        update = family.called_attention(block, u, visible)
    else:
        q, k, v = family.project(block, u, keys_from, family.qkv_bias(block), at, at if keys_from is u else at.all())
        head_scale = family.head_scale(block)
        visible = visible.to(q.dtype)
        factor = family.attention_scale(block)
        out, _, _ = subset_attention(q, k, v, None, head_scale, factor, visible, keep_cache=False)
        update = family.attention_output(block, out)
    rows = before + gamma1 * update
    if family.has_between:
        rows = family.between(block, rows, at, call)

    u = normalize_modulate(rows, scale2, shift2)
    of_scales = u.split([scale.keep for scale in schedule], dim=1)
    updates = [_ffn(block, segment, k, call) for segment, k in zip(of_scales, kept, strict=True)]
    rows = rows + gamma2 * torch.cat(updates, dim=1)

    if is_trained(block.actvar.selector):
        rows = before + (rows - before) * torch.cat([_token_gate(k) for k in kept], dim=1).unsqueeze(-1)
    return x.scatter(1, index, rows.to(x.dtype))


def _select(
    block: nn.Module, x: torch.Tensor, scale1: torch.Tensor, shift1: torch.Tensor, scale: Scale, current: Pass
) -> KeptTokens:
    if not scale.select:
        return KeptTokens(scale, torch.arange(scale.tokens, device=x.device).expand(x.shape[0], -1), None)
    selection = selected(block, x[:, scale.start : scale.start + scale.tokens], scale1, shift1, scale, current)
    return KeptTokens(scale, selection.index, selection.scores)


def _ffn(block: nn.Module, u: torch.Tensor, kept: KeptTokens, call: BlockCall) -> torch.Tensor:
    """Run the FFN on one scale's kept rows `u` `[R, K, C]`, and record it where the scale is active."""
    family = block.actvar.family
    router, scale, records = block.actvar.router, kept.scale, block.actvar.shared.records
    mask = logits = None
    if scale.route:
        mask, logits = route_experts(u, router.weight, router.bias, scale.experts)
        gate = mask * straight_through(logits) if is_trained(router) else mask
        update = expert_ffn(u, gate, scale.experts, *family.ffn_weights(block))
    else:
        update = family.called_ffn(block, u)
    if records is not None and scale.active and not computing_again():
        index = kept.index if scale.select else None
        records.append(BlockRecord(block.actvar.block_index, scale, index, kept.scores, u, mask, logits, call))
    return update


def _token_gate(kept: KeptTokens) -> torch.Tensor:
    """`[R, K]`: 1 in value, with the gradient of the kept tokens' probabilities where they were selected."""
    if kept.scores is None:
        return torch.ones_like(kept.index, dtype=torch.float32)
    return straight_through(kept.scores).gather(1, kept.index)


def _scales_of(schedule: tuple[Scale, ...], tokens: int) -> tuple[Scale, ...]:
    for count, scale in enumerate(schedule, start=1):
        if scale.start + scale.tokens == tokens:
            return schedule[:count]
    ends = [scale.start + scale.tokens for scale in schedule]
    raise ValueError(f"expected the tokens of the first scales, one of {ends}, got {tokens}")


def is_trained(gate: nn.Module) -> bool:
    return gate.weight.requires_grad and torch.is_grad_enabled()


def straight_through(scores: torch.Tensor) -> torch.Tensor:
    """`1 + p - stopgrad(p)`, p = softmax over the last axis: exactly 1 in value, the gradient of p."""
    p = scores.softmax(dim=-1)
    return 1 + (p - p.detach())


def block_causal_mask(schedule: tuple[Scale, ...], kv: str, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask `[queries, keys]` in the dtype of `like`: a row sees its own scale and earlier ones."""

    def levels(counts: list[int]) -> torch.Tensor:
        index, repeats = torch.arange(len(counts), device=like.device), torch.tensor(counts, device=like.device)
        return index.repeat_interleave(repeats, output_size=sum(counts))

    queries = levels([scale.keep for scale in schedule])
    keys = queries if kv == "compact" else levels([scale.tokens for scale in schedule])
    hidden = queries.unsqueeze(1) < keys.unsqueeze(0)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
