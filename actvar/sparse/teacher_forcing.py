"""Run the ActVAR block over all scales at once, as training does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from actvar.families.base import ATTENTION, BlockCall, Rows
from actvar.sparse.layer_calls import first_experts, in_dtype, quantized_ffn
from actvar.sparse.passes import Pass, computing_again
from actvar.sparse.record import BlockRecord
from actvar.sparse.schedule import Scale
from actvar.sparse.selection import selected
from actvar_kernels import expert_ffn, normalize_modulate, route_experts, subset_attention


class KeptTokens(NamedTuple):
    """Hold the tokens that a block keeps of one scale.

    Args:
        scale: the scale.
        index: the kept tokens within the scale, `[R, K]` int64.
        scores: logits of the selector, `[R, L]` float32, or None where nothing is selected.
    """

    scale: Scale
    index: torch.Tensor
    scores: torch.Tensor | None


def teacher_forced_block(block: Any, call: BlockCall, current: Pass) -> torch.Tensor:
    """Run all scales of a pass at once: `[R, L, C]` -> `[R, L, C]`.

    Rows that a scale dropped are invisible to every later query, as in sampling.

    While a gate is being trained, the kept tokens' updates or the chosen experts' outputs are multiplied by
    `1 + p - stopgrad(p)` (straight-through). Here p is the softmax of the gate's scores, and values change by rounding
    only.

    Args:
        block: a patched block.
        call: arguments of the block.
        current: the pass of the call.

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

    dtype = family.layer_dtype(block)
    u = in_dtype(normalize_modulate(before, scale1, shift1), dtype)
    keys_from = u if shared.config.kv == "compact" else in_dtype(normalize_modulate(x, scale1, shift1), dtype)
    visible = block_causal_mask(schedule, shared.config.kv, u)
    if ATTENTION in block.actvar.called:
        update = family.called_attention(block, u, visible, at, call)
    else:
        keys_at = at if keys_from is u else at.all()
        q, k, v = family.project(block, u, keys_from, family.qkv_bias(block), at, keys_at, call)
        head_scale = family.head_scale(block)
        visible = visible.to(q.dtype)
        factor = family.attention_scale(block)
        out, _, _ = subset_attention(q, k, v, None, head_scale, factor, visible, keep_cache=False)
        update = family.attention_output(block, out)
    rows = before + gamma1 * update
    if family.has_between:
        gamma, scale, shift = family.between_norm(block, len(x))
        rows = rows + gamma * family.between(block, in_dtype(normalize_modulate(rows, scale, shift), dtype), at, call)

    u = in_dtype(normalize_modulate(rows, scale2, shift2), dtype)
    segments = u.split([scale.keep for scale in schedule], dim=1)
    updates = [_ffn(block, segment, k, call) for segment, k in zip(segments, kept, strict=True)]
    rows = rows + gamma2 * torch.cat(updates, dim=1)

    if is_trained(block.actvar.selector):
        rows = before + (rows - before) * torch.cat([_token_gate(k) for k in kept], dim=1).unsqueeze(-1)
    return x.scatter(1, index, rows.to(x.dtype))


def _select(
    block: Any, x: torch.Tensor, scale1: torch.Tensor, shift1: torch.Tensor, scale: Scale, current: Pass
) -> KeptTokens:
    """Return the tokens that the block keeps of one scale of `x` `[R, L, C]`, which has all scales."""
    if not scale.select:
        return KeptTokens(scale, torch.arange(scale.tokens, device=x.device).expand(x.shape[0], -1), None)
    selection = selected(block, x[:, scale.start : scale.start + scale.tokens], scale1, shift1, scale, current)
    return KeptTokens(scale, selection.index, selection.scores)


def _ffn(block: Any, u: torch.Tensor, kept: KeptTokens, call: BlockCall) -> torch.Tensor:
    """Return the FFN's output `[R, K, C]` for one scale's kept rows `u` `[R, K, C]`, and record an active scale."""
    family = block.actvar.family
    router, scale, records = block.actvar.router, kept.scale, block.actvar.shared.records
    mask = logits = None
    if scale.route:
        mask, logits = route_experts(u, router.weight, router.bias, scale.experts)
        gate = mask * straight_through(logits) if is_trained(router) else mask
        update = expert_ffn(u, gate, scale.experts, *family.ffn_weights(block), quantized=block.actvar.quantized)
    elif scale.static:
        update = first_experts(block, u, scale)
    elif block.actvar.quantized is not None:
        update = quantized_ffn(block, u)
    else:
        update = family.called_ffn(block, u)
    if records is not None and scale.active and not computing_again():
        index = kept.index if scale.select else None
        records.append(BlockRecord(block.actvar.block_index, scale, index, kept.scores, u, mask, logits, call))
    return update


def _token_gate(kept: KeptTokens) -> torch.Tensor:
    """Return `[R, K]` float32: 1 in value, with the gradient of the kept tokens' probabilities if any are selected."""
    if kept.scores is None:
        return torch.ones_like(kept.index, dtype=torch.float32)
    return straight_through(kept.scores).gather(1, kept.index)


def _scales_of(schedule: tuple[Scale, ...], tokens: int) -> tuple[Scale, ...]:
    """Return the first scales of `schedule`, which have `tokens` tokens together; raise a ValueError if none have."""
    for count, scale in enumerate(schedule, start=1):
        if scale.start + scale.tokens == tokens:
            return schedule[:count]
    ends = [scale.start + scale.tokens for scale in schedule]
    raise ValueError(f"expected the tokens of the first scales, one of {ends}, got {tokens}")


def is_trained(gate: Any) -> bool:
    """Return whether gradients of a `Gate` are wanted."""
    return gate.weight.requires_grad and torch.is_grad_enabled()


def straight_through(scores: torch.Tensor) -> torch.Tensor:
    """Return `1 + p - stopgrad(p)` in the shape of `scores`: exactly 1 in value, with the gradient of p.

    p is the softmax of `scores` over the last axis.
    """
    p = scores.softmax(dim=-1)
    return 1 + (p - p.detach())


def block_causal_mask(schedule: tuple[Scale, ...], kv: str, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask `[queries, keys]` by which a row sees its own scale and earlier ones.

    Args:
        schedule: the scales of the pass.
        kv: `ActVARConfig.kv`, which says whether keys are those of kept tokens or of all.
        like: a tensor of the dtype and device that the mask gets.
    """

    def levels(counts: list[int]) -> torch.Tensor:
        index, repeats = torch.arange(len(counts), device=like.device), torch.tensor(counts, device=like.device)
        return index.repeat_interleave(repeats, output_size=sum(counts))

    queries = levels([scale.keep for scale in schedule])
    keys = queries if kv == "compact" else levels([scale.tokens for scale in schedule])
    hidden = queries.unsqueeze(1) < keys.unsqueeze(0)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
