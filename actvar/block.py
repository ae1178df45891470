"""The ActVAR block: select, attend with the kept tokens, run the chosen experts, put the result back."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
from actvar.recording import BlockRecord, Shared
from actvar.schedule import Scale
from actvar.teacher_forcing import teacher_forced_block
from actvar_kernels import (
    add_normalize,
    add_normalize_route,
    expert_ffn_scatter,
    normalize_modulate,
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
                return self.dense_forward(x, cond_BD, attn_bias)
            return teacher_forced_block(self, x, cond_BD)
        scale = shared.scale_of(x.shape[1], family.cached_tokens(self))
        if not scale.active:
            return self.dense_forward(x, cond_BD, attn_bias)
        return sparse_block(self, x, cond_BD, scale)

    def dense_forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        """The block as it was before patching."""
        return super().forward(x, cond_BD, attn_bias)


def sparse_block(block: ActVARBlock, x: torch.Tensor, cond: torch.Tensor, scale: Scale) -> torch.Tensor:
    """One active scale `x` `[R, L, C]` with the K/V cache; an operation whose rate is 1 is left out."""
    gates, shared = block.actvar, block.actvar.shared
    selector, router = gates.selector, gates.router
    gamma1, gamma2, scale1, scale2, shift1, shift2 = family.modulation(block, cond)
    index = scores = rest = mask = logits = None

    # 1. Select the tokens to update; 2. gather, normalise and modulate their rows
    if scale.select:
        index, rows, u, scores, rest = select_tokens(
            x, selector.weight, selector.bias, scale1, shift1, scale.keep, share_guidance=shared.selection_is_shared
        )
    else:
        rows, u = x, normalize_modulate(x, scale1, shift1)

    # attention of the kept tokens over the cache and their own scale
    keys_from = normalize_modulate(x, scale1, shift1) if scale.select and shared.config.kv == "all" else u
    q, k, v = family.project(block, u, keys_from)
    out, keys, values = subset_attention(
        q, k, v, family.read_cache(block), family.head_scale(block), block.attn.scale, keep_cache=not scale.is_last
    )
    if not scale.is_last:
        family.write_cache(block, keys, values)
    update = block.attn.proj(out)

    # 3. FFN as experts; 4. scatter: the other tokens keep their value
    if scale.route:
        rows, u, mask, logits = add_normalize_route(
            rows, update, gamma1, scale2, shift2, router.weight, router.bias, scale.experts
        )
        weights = family.ffn_weights(block)
        x = expert_ffn_scatter(rest, index, rows, u, mask, scale.experts, *weights, gamma2)
    else:
        rows, u = add_normalize(rows, update, gamma1, scale2, shift2)
        update = block.ffn(u)
        x = rows + gamma2 * update if index is None else scatter_rows(rest, index, rows, update, gamma2)

    if shared.records is not None:
        shared.records.append(BlockRecord(gates.block_index, scale, index, scores, u, mask, logits))
    return x
