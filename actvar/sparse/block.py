"""The ActVAR block: select, attend with the kept tokens, run the chosen experts, put the result back."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
from actvar.sparse.block_cache import PerSample, continued, keep
from actvar.sparse.called_layers import begin
from actvar.sparse.passes import Pass, computing_again
from actvar.sparse.schedule import Scale
from actvar.sparse.selection import selected
from actvar.sparse.state import BlockRecord
from actvar.sparse.teacher_forcing import teacher_forced_block
from actvar_kernels import (
    add_normalize,
    add_normalize_route,
    choose_fused,
    expert_ffn_scatter,
    normalize_modulate,
    scatter_rows,
    subset_attention,
)
from actvar_kernels.backend import REFERENCE, Backend


class ActVARBlock(nn.Module):
    """Mixed into the class of a patched block, in front of it; `self.actvar` holds selector, router and schedule."""

    def forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[R, L, C]` -> `[R, L, C]`: one scale with the K/V cache, or all scales at once under `attn_bias`.

        Raises:
            ValueError: the token count and cache length fit no scale of the model.
            RuntimeError: activation checkpointing runs the block again, and its K/V cache or its pass is lost.
        """
        shared = self.actvar.shared
        current = shared.pass_of(self.actvar.block_index, x, cond_BD)
        out = self._forward_in(current, x, cond_BD, attn_bias)
        shared.hand_on(current, out)
        return out

    def _forward_in(
        self, current: Pass, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`forward` within a pass."""
        gates = self.actvar
        if attn_bias is not None:
            if not any(scale.active for scale in gates.schedule):
                return self.dense_forward(x, cond_BD, attn_bias)
            begin(self)
            return teacher_forced_block(self, x, cond_BD, current)
        if computing_again():
            raise RuntimeError(
                "expected one forward pass over a scale, got another one by activation checkpointing, for which the "
                "K/V cache is no longer what it was; call blocks without a checkpoint, or pass attn_bias (teacher "
                "forcing)"
            )
        scale = gates.shared.scale_of(gates.block_index, x.shape[1], family.cached_tokens(self))
        if scale.index == 0:
            begin(self)
        backend = REFERENCE if "ln_wo_grad" in gates.called else choose_fused(x)
        if scale.active or backend.fuses:
            return block_at_scale(self, x, cond_BD, scale, backend, current)
        return self.dense_forward(x, cond_BD, attn_bias)

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict[str, torch.Tensor]:
        """With hidden units in their original order, as the block's own."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.actvar.order is not None:
            _reorder_state(state, prefix, self.actvar.order.argsort())
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Takes a `state_dict` in the original order; runs before the parts of the block load theirs."""
        if self.actvar.order is not None:
            _reorder_state(state_dict, prefix, self.actvar.order)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dense_forward(self, x: torch.Tensor, cond_BD: torch.Tensor, attn_bias: torch.Tensor | None) -> torch.Tensor:
        """The block as it was before patching."""
        return super().forward(x, cond_BD, attn_bias)


def _reorder_state(state: dict[str, torch.Tensor], prefix: str, order: torch.Tensor) -> None:
    """Hidden units of the FFN's tensors in a `state_dict`, those that are there, in another order."""
    for name, axis in family.HIDDEN_AXES.items():
        tensor = state.get(prefix + name)
        if tensor is not None and tensor.shape[axis] == len(order):  # a wrong shape is reported by its own layer
            state[prefix + name] = tensor.index_select(axis, order.to(tensor.device))


def block_at_scale(
    block: ActVARBlock, x: torch.Tensor, cond: torch.Tensor, scale: Scale, backend: Backend, current: Pass
) -> torch.Tensor:
    """One scale `x` `[R, L, C]` of the pass `current` with the K/V cache; an operation whose rate is 1 is left out.
    `backend`: what the block runs on."""
    gates = block.actvar
    shared, router = gates.shared, gates.router
    fused = backend.fuses
    state = state_of(block, cond, fused)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = state.modulation
    index = scores = rest = mask = logits = None

    # 1. Select the tokens to update; 2. gather, normalise and modulate their rows
    if scale.select:
        index, u, scores, rest = selected(block, x, scale1, shift1, scale, current, shared.writes_in_place and fused)
    else:
        u = normalize_modulate(x, scale1, shift1)

    # attention of the kept tokens over the cache and their own scale
    keys_from = normalize_modulate(x, scale1, shift1) if scale.select and shared.config.kv == "all" else u
    update = attend(block, u, keys_from, state, scale, fused)

    # 3. FFN as experts; 4. scatter: the other tokens keep their value
    if scale.route:
        rows, u, mask, logits = add_normalize_route(
            x, index, update, gamma1, scale2, shift2, router.weight, router.bias, scale.experts, backend.fuses_residual
        )
        weights = family.ffn_weights(block)
        schedule = shared.config.expert_schedule
        x = expert_ffn_scatter(rest, index, rows, u, mask, scale.experts, *weights, gamma2, schedule)
    else:
        rows, u = add_normalize(x, index, update, gamma1, scale2, shift2)
        update = family.dense_ffn(block, u, shared.config.num_experts)
        x = scatter_rows(rest, index, rows, update, gamma2)

    if shared.records is not None and scale.active:
        shared.records.append(BlockRecord(gates.block_index, scale, index, scores, u, mask, logits))
    return x


def state_of(block: ActVARBlock, cond: torch.Tensor, fused: bool) -> PerSample:
    """What the block computes once per sample; with kernels, `fused`, kept since the scale before."""
    return continued(block, cond) if fused else PerSample(block, cond)


def attend(
    block: ActVARBlock, u: torch.Tensor, keys_from: torch.Tensor, state: PerSample, scale: Scale, fused: bool
) -> torch.Tensor:
    """Attention of the rows `u` `[R, K, C]`, normalised and modulated, over the K/V cache and `keys_from` `[R, T, C]`,
    projected: `[R, K, C]`. The cache gets the new keys and values, where a later scale needs them."""
    gates = block.actvar
    if "attn" in gates.called:
        out = block.attn(u, attn_bias=None)
        if fused:
            keep(block, state, scale)
        return out
    q, k, v = family.project(block, u, keys_from, state.qkv_bias)
    past = family.read_cache(block)
    grows = block.attn.caching and not scale.is_last
    room = state.room_after(past, v, gates.schedule[-1].cached_before, gates.kept) if grows and fused else None
    out, keys, values = subset_attention(q, k, v, past, state.head_scale, block.attn.scale, room=room, keep_cache=grows)
    if grows:
        family.write_cache(block, keys, values)
    if fused:
        keep(block, state, scale)
    return family.attention_output(block, out)
