"""The ActVAR block: select, attend with the kept tokens, run the chosen experts, put the result back."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
from actvar.recording import BlockRecord, Shared
from actvar.schedule import Scale
from actvar_kernels import (
    expert_ffn,
    normalize_modulate,
    route_experts,
    scatter_rows,
    select_tokens,
    subset_attention,
)


class ActVARBlock(nn.Module):
    """Mixed into the class of a patched block, in front of it; `self.actvar` holds selector, router and schedule."""

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[R, L, C]` -> `[R, L, C]`: one scale with the K/V cache, or all scales at once under `attn_bias`.

        Raises:
            ValueError: the token count and cache length fit no scale of the model.
        """
        shared: Shared = self.actvar.shared
        if attn_bias is not None:
            if not any(scale.active for scale in shared.schedule):
                return super().forward(x, cond_BD, attn_bias)
            return teacher_forced_block(self, x, cond_BD)
        scale = shared.scale_of(x.shape[1], family.cached_tokens(self))
        if not scale.active:
            return super().forward(x, cond_BD, attn_bias)
        return sparse_block(self, x, cond_BD, scale)

    def dense_forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        """The block as it was before patching."""
        return super().forward(x, cond_BD, attn_bias)


def sparse_block(block: ActVARBlock, x: torch.Tensor, cond: torch.Tensor, scale: Scale) -> torch.Tensor:
    """One active scale `[R, L, C]` with the K/V cache."""
    gates, shared = block.actvar, block.actvar.shared
    gamma1, gamma2, scale1, scale2, shift1, shift2 = family.modulation(block, cond)

    if scale.select:
        index, rows, u, scores = select_tokens(
            x,
            gates.selector.weight,
            gates.selector.bias,
            scale1,
            shift1,
            scale.keep,
            share_guidance=shared.selection_is_shared,
        )
    else:
        index, rows, u, scores = None, x, normalize_modulate(x, scale1, shift1), None
    keys_from = normalize_modulate(x, scale1, shift1) if scale.select and shared.config.kv == "all" else u

    q, k, v = family.project(block, u, keys_from)
    out, keys, values = subset_attention(q, k, v, family.read_cache(block), family.head_scale(block), block.attn.scale)
    if not scale.is_last:
        family.write_cache(block, keys, values)
    rows = rows + gamma1 * block.attn.proj(out)

    u = normalize_modulate(rows, scale2, shift2)
    if scale.route:
        mask, logits = route_experts(u, gates.router.weight, gates.router.bias, scale.experts)
        update = expert_ffn(u, mask, scale.experts, *family.ffn_weights(block))
    else:
        mask, logits, update = None, None, block.ffn(u)

    if shared.records is not None:
        shared.records.append(
            BlockRecord(gates.block_index, scale, index=index, scores=scores, u=u, mask=mask, logits=logits)
        )
    if index is None:
        return rows + gamma2 * update
    return scatter_rows(x, index, rows, update, gamma2)


def teacher_forced_block(block: ActVARBlock, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """All scales `[R, L, C]` at once: rows that a scale dropped are invisible to every later query, as in sampling.

    Where scores or logits need a gradient, the kept tokens' updates and the chosen experts' outputs are multiplied by
    `1 + p - stopgrad(p)` (straight-through), p their softmax; the values do not change.
    """
    gates, shared = block.actvar, block.actvar.shared
    gamma1, gamma2, scale1, scale2, shift1, shift2 = family.modulation(block, cond)

    parts, token_gates, all_scores = [], [], []
    for scale in shared.schedule:
        segment = x[:, scale.start : scale.start + scale.tokens]
        if scale.select:
            selection = select_tokens(
                segment,
                gates.selector.weight,
                gates.selector.bias,
                scale1,
                shift1,
                scale.keep,
                share_guidance=shared.selection_is_shared,
            )
            index, scores = selection.index, selection.scores
            gate = straight_through(scores).gather(1, index) if scores.requires_grad else None
        else:
            index = torch.arange(scale.tokens, device=x.device).expand(x.shape[0], -1)
            gate, scores = None, None
        parts.append(index + scale.start)
        token_gates.append(torch.ones_like(index, dtype=torch.float32) if gate is None else gate)
        all_scores.append(scores)
    index, token_gate = torch.cat(parts, dim=1), torch.cat(token_gates, dim=1).unsqueeze(-1)

    kept = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    u = normalize_modulate(kept, scale1, shift1)
    keys_from = normalize_modulate(x, scale1, shift1) if shared.config.kv == "all" else u
    q, k, v = family.project(block, u, keys_from)
    mask = block_causal_mask(shared.schedule, shared.config.kv, q)
    out, _, _ = subset_attention(q, k, v, None, family.head_scale(block), block.attn.scale, mask)
    rows = kept + gamma1 * block.attn.proj(out)

    u = normalize_modulate(rows, scale2, shift2)
    updates, position = [], 0
    for scale, scores, positions in zip(shared.schedule, all_scores, parts, strict=True):
        segment = u[:, position : position + scale.keep]
        position += scale.keep
        if scale.route:
            mask, logits = route_experts(segment, gates.router.weight, gates.router.bias, scale.experts)
            gate = mask * straight_through(logits) if logits.requires_grad else mask
            updates.append(expert_ffn(segment, gate, scale.experts, *family.ffn_weights(block)))
        else:
            mask, logits = None, None
            updates.append(block.ffn(segment))
        if shared.records is not None and scale.active:
            chosen = positions - scale.start if scale.select else None
            shared.records.append(
                BlockRecord(
                    gates.block_index,
                    scale,
                    index=chosen,
                    scores=scores,
                    u=segment,
                    mask=mask,
                    logits=logits,
                    block_input=x,
                    cond=cond,
                )
            )
    rows = rows + gamma2 * torch.cat(updates, dim=1)
    if token_gate.requires_grad:
        rows = kept + (rows - kept) * token_gate
    return x.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]), rows.to(x.dtype))


def straight_through(scores: torch.Tensor) -> torch.Tensor:
    """`1 + p - stopgrad(p)`, p = softmax over the last axis: exactly 1 in value, the gradient of p."""
    p = scores.softmax(dim=-1)
    return 1 + (p - p.detach())


def block_causal_mask(schedule: tuple[Scale, ...], kv: str, q: torch.Tensor) -> torch.Tensor:
    """Additive mask `[queries, keys]` in q's dtype: a row sees its own scale and earlier ones."""

    def levels(counts: list[int]) -> torch.Tensor:
        return torch.arange(len(counts), device=q.device).repeat_interleave(torch.tensor(counts, device=q.device))

    queries = levels([scale.keep for scale in schedule])
    keys = queries if kv == "compact" else levels([scale.tokens for scale in schedule])
    hidden = queries.unsqueeze(1) < keys.unsqueeze(0)
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
