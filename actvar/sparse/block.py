"""Run the ActVAR block: select tokens, let them attend, run the chosen experts, put the result back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actvar.families.base import ATTENTION, NORM, BlockCall, Rows
from actvar.families.kv_cache import Cache
from actvar.sparse.block_cache import SampleState
from actvar.sparse.block_state import BlockState
from actvar.sparse.layer_calls import first_experts, quantized_ffn, takes_few_rows
from actvar.sparse.passes import Pass, computing_again
from actvar.sparse.record import BlockRecord
from actvar.sparse.schedule import Scale
from actvar.sparse.selection import selected
from actvar.sparse.teacher_forcing import teacher_forced_block
from actvar.utils.weight_override import own_weights
from actvar_kernels import (
    Gated,
    Residual,
    add_normalize,
    add_normalize_route,
    choose_fused,
    expert_ffn_scatter,
    normalize_modulate,
    scatter_rows,
    subset_attention,
)
from actvar_kernels.backend import REFERENCE, Backend
from actvar_kernels.triton_backend.row_form import NormedRows, RowForm, values_of


class ActVARBlock(nn.Module):
    """Run a patched block; goes in front of the block's class, with selector, router and schedule in `self.actvar`."""

    actvar: BlockState

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one scale with the K/V cache, or all scales at once under a mask: `[R, L, C]` -> `[R, L, C]`.

        At a scale without guidance the result is that of the conditional rows alone, `[R / 2, L, C]`. The block takes
        such an `x` from the block before, with the condition of all rows.

        Args:
            args, kwargs: arguments of the block's own `forward`.

        Raises:
            ValueError: the token count and cache length fit no scale of the model, or the scale is one without
                guidance and the rows are not known to be guided.
            ValueError: all scales come at once, and the adapter's weights are not for all of them.
            RuntimeError: activation checkpointing runs the block again, and its K/V cache or its pass is lost.
        """
        state = self.actvar
        call = state.family.block_call(*args, **kwargs)
        current = state.shared.pass_of(state.block_index, call)
        out = self._forward_in(current, call)
        state.shared.hand_on(current, out)
        return out

    def _forward_in(self, current: Pass, call: BlockCall) -> Tensor:
        """Run `forward` within the pass that the call belongs to, `[R, L, C]` -> `[R, L, C]`."""
        state = self.actvar
        if call.mask is not None:
            state.shared.expect_same_weights()
            if state.quantized is None and not any(scale.active for scale in state.schedule):
                return self.dense_forward(call)
            state.shared.begin_block(state.block_index, self)
            return teacher_forced_block(self, call, current)
        if computing_again():
            raise RuntimeError(
                "expected one forward pass over a scale, got another one by activation checkpointing, for which the "
                "K/V cache is no longer what it was; call blocks without a checkpoint, or pass attn_bias (teacher "
                "forcing)"
            )
        scale = state.shared.scale_of(state.block_index, call, state.family.cache(self).rows)
        state.shared.use_weights_of(scale)
        with nullcontext() if scale.tuned else own_weights(self):
            return self._run_scale(scale, current, call)

    def _run_scale(self, scale: Scale, current: Pass, call: BlockCall) -> Tensor:
        """Run `forward` at one scale, `[R, L, C]` -> `[R, L, C]`, or `[R / 2, L, C]` without guidance."""
        state = self.actvar
        if scale.index == 0 or scale.index == state.shared.first_tuned:
            state.shared.begin_block(state.block_index, self)
        backend = REFERENCE if NORM in state.called else choose_fused(call.x)
        if scale.active or backend.fuses or state.quantized is not None:
            return block_at_scale(self, call, scale, backend, current)
        if state.shared.leaves_out_rows(scale):
            call = state.family.conditional(call)
            keep_rows(state.family.cache(self), len(call.x))
        return self.dense_forward(call)

    def state_dict(self, *args, prefix: str = "", **kwargs) -> dict[str, Tensor]:
        """Return the block's own state, with hidden units in their original order."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.actvar.changed_order is not None:
            self._reorder(state, prefix, self.actvar.changed_order.argsort())
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Take a `state_dict` in the original order. The block runs this before its parts load their tensors."""
        if self.actvar.changed_order is not None:
            self._reorder(state_dict, prefix, self.actvar.changed_order)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reorder(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Bring the hidden units of the FFN's tensors in `state` into the order `order` `[D]` int64."""
        for name, axis in self.actvar.family.hidden_axes.items():
            tensor = state.get(prefix + name)
            if tensor is not None and tensor.shape[axis] == len(order):  # a wrong shape is reported by its own layer
                state[prefix + name] = tensor.index_select(axis, order.to(tensor.device))

    def dense_forward(self, call: BlockCall) -> Tensor:
        """Run the block as it was before patching: `[R, L, C]` -> `[R, L, C]`."""
        return super().forward(**self.actvar.family.block_arguments(call))


def block_at_scale(block: ActVARBlock, call: BlockCall, scale: Scale, backend: Backend, current: Pass) -> Tensor:
    """Run one scale with the K/V cache, `[R, L, C]` -> `[R, L, C]`; an operation whose rate is 1 is left out.

    Without guidance the result is that of the conditional rows alone, `[R / 2, L, C]`.

    Args:
        block: a patched block.
        call: arguments of the block.
        scale: the scale of the call.
        backend: what the block runs on.
        current: the pass that the call belongs to.
    """
    state = block.actvar
    shared, router, family = state.shared, state.router, state.family
    fused = backend.fuses
    all_rows = call
    if shared.leaves_out_rows(scale):
        call, current = family.conditional(call), replace(current, rows_are_guided=False)
    sample = sample_state_of(block, all_rows.cond if fused else call.cond, scale, fused)
    if call is not all_rows:
        sample.keep_rows(len(call.x))
        keep_rows(family.cache(block), len(call.x))
    x, dtype = call.x, family.layer_dtype(block)
    form = _form_of(block, x, dtype)
    deferred = shared.take_deferred(x)
    if takes_few_rows(block, x, scale, backend):
        return dense_block_of_few_rows(block, x if deferred is None else deferred, sample, scale, call)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = sample.modulation
    index = scores = base = mask = logits = None

    # 1. Select the tokens to update; 2. gather, normalise and modulate their rows
    if deferred is not None:
        x, u = add_normalize(deferred.x, None, deferred.update, deferred.gamma, scale1, shift1, form)
    elif scale.select:
        in_place = shared.writes_in_place and fused
        index, u, scores, base = selected(block, x, scale1, shift1, scale, current, in_place, form)
    else:
        u = normalize_modulate(x, scale1, shift1, form=form)

    # attention of the kept tokens over the cache and their own scale
    at = Rows(scale.start, scale.tokens, index)
    keys_from = u
    if scale.select and shared.config.kv == "all":
        keys_from = normalize_modulate(x, scale1, shift1, form=form)
    update = attend(block, u, keys_from, sample, scale, fused, at, call)

    # the layer between attention and FFN, such as cross-attention; then the rows that are kept are all there are
    kept = index
    if family.has_between:
        gamma, between_scale, between_shift = family.between_norm(block, len(x))
        x, u = add_normalize(
            x, index, update, gamma1, between_scale, between_shift, form and form._replace(quantized=None)
        )
        update, gamma1, kept = family.between(block, u, at, call), gamma, None

    # 3. FFN as experts; 4. scatter: the other tokens keep their value
    if scale.route:
        gate = router.weight, router.bias, scale.experts
        defers = backend.fuses_residual and not family.has_between
        rows, u, mask, logits = add_normalize_route(x, kept, update, gamma1, scale2, shift2, *gate, defers, form)
        weights, execution = family.ffn_weights(block), shared.execution.expert_execution
        x = expert_ffn_scatter(base, index, rows, u, mask, scale.experts, *weights, gamma2, execution, state.quantized)
    else:
        rows, u = add_normalize(x, kept, update, gamma1, scale2, shift2, form)
        update = ffn_without_router(block, u, scale)
        if index is None and backend.fuses_residual and shared.defers(state.block_index, scale):
            shared.deferred, x = Residual(rows, update, gamma2), rows  # the next block's norm adds it in its launch
        else:
            x = scatter_rows(base, index, rows, update, gamma2)

    if shared.records is not None and scale.active:
        shared.records.append(BlockRecord(state.block_index, scale, index, scores, values_of(u), mask, logits))
    return x


def dense_block_of_few_rows(
    block: ActVARBlock, x: Tensor | Residual, sample: SampleState, scale: Scale, call: BlockCall
) -> Tensor:
    """Run one scale in 5 launches: both norms ahead of a product, and both residuals behind one, in its launch.

    Args:
        block: a patched block.
        x: the input `[R, L, C]`, or what the block before left to the first norm, which then is a launch of its own.
        sample: the values that the block computes once per sample.
        scale: the scale of the rows.
        call: arguments of the block.

    Returns:
        `[R, L, C]`, with no residual left.
    """
    family = block.actvar.family
    gamma1, gamma2, scale1, scale2, shift1, shift2 = sample.modulation
    if isinstance(x, Residual):
        x, u = add_normalize(x.x, None, x.update, x.gamma, scale1, shift1)
    else:
        u = NormedRows(x, scale1, shift1)
    at = Rows(scale.start, scale.tokens, None)
    x = attend(block, u, u, sample, scale, True, at, call, onto=Gated(x, gamma1))
    return family.ffn_added(block, NormedRows(x, scale2, shift2), Gated(x, gamma2))


def _form_of(block: ActVARBlock, x: Tensor, dtype: torch.dtype | None) -> RowForm | None:
    """Return the form in which the layers of a block take rows after a norm; None for that of the residual stream.

    Args:
        block: a patched block.
        x: the residual stream.
        dtype: what `Family.layer_dtype` says.
    """
    # records have the rows themselves, and autocast converts them
    plain = block.actvar.shared.records is not None or torch.is_autocast_enabled(x.device.type)
    quantized = None if plain else block.actvar.quantized
    return None if dtype is quantized is None else RowForm(x.dtype if dtype is None else dtype, quantized)


def ffn_without_router(block: ActVARBlock, u: Any, scale: Scale) -> Tensor:
    """Return the FFN's output `[R, K, C]` for rows `u` `[R, K, C]` of a scale at which no token chooses its experts."""
    state = block.actvar
    if scale.static:
        return first_experts(block, u, scale)
    if state.quantized is not None:
        return quantized_ffn(block, u)
    return state.family.dense_ffn(block, u, state.shared.config.num_experts)


def sample_state_of(block: ActVARBlock, cond: Any, scale: Scale, fused: bool) -> SampleState:
    """Return the values that the block computes once per sample, kept since the scale before where kernels run."""
    return block.actvar.cache.continued(block, cond, scale) if fused else SampleState(block, cond)


def keep_rows(cache: Cache, rows: int) -> None:
    """Keep the first `rows` rows of the K/V cache of a block, those with the class, where there are more."""
    past = cache.read()
    if past is not None and len(past[0]) > rows:
        cache.write(past[0][:rows], past[1][:rows])


def attend(
    block: ActVARBlock,
    u: Any,
    keys_from: Any,
    sample: SampleState,
    scale: Scale,
    fused: bool,
    at: Rows,
    call: BlockCall,
    onto: Gated | None = None,
) -> Tensor:
    """Return attention of rows over the K/V cache and their own scale, projected: `[R, K, C]`.

    The new keys and values go into the cache where a later scale needs them.

    Args:
        block: a patched block.
        u: rows after norm and modulation, `[R, K, C]`, maybe in eight bits.
        keys_from: rows that keys and values come from, `[R, T, C]`, maybe in eight bits.
        sample: the values that the block computes once per sample.
        scale: the scale of the rows.
        fused: whether kernels run.
        at: positions of the rows `u`.
        call: arguments of the block.
        onto: rows that the result is added to, times their gate; None: it is returned.
    """
    state = block.actvar
    family, cache = state.family, state.family.cache(block)
    if ATTENTION in state.called:
        out = family.called_attention(block, u, None, at, call)
        if fused:
            state.cache.keep(block, sample, scale)
        return out
    keys_at = at if keys_from is u else at.all()
    q, k, v = family.project(block, u, keys_from, sample.qkv_bias, at, keys_at, call)
    past = cache.read()
    grows = cache.is_on and not scale.is_last
    buffer = None
    if grows and fused:
        buffer = sample.kv_buffer_after(past, v, state.schedule[-1].cached_before, state.cache)
    factor = family.attention_scale(block)
    out, keys, values = subset_attention(q, k, v, past, sample.head_scale, factor, room=buffer, keep_cache=grows)
    if grows:
        cache.write(keys, values)  # pyright: ignore[reportArgumentType]  # keep_cache gives tensors
    if fused:
        state.cache.keep(block, sample, scale)
    if onto is not None:
        return family.attention_added(block, out, onto)
    return family.attention_output(block, out)
