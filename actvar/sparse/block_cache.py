"""Keep from scale to scale what a block computes once per sample, and the memory of the K/V cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actvar.families.base import MODULATION, Family
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused

KVBuffer = tuple[Tensor, Tensor]
"""Preallocated keys and values, each `[R, H, capacity, d]`, which begin with the K/V cache."""


class SampleState:
    """Hold the values that one block computes once per sample.

    `modulation` is gamma1, gamma2, scale1, scale2, shift1 and shift2, each `[R, 1, C]`, for C++ in float32. `qkv_bias`
    is `[3C]`. `head_scale` is `[H]`, or None without QK norm. `kv_buffer` is None until keys and values are cached.

    Args:
        block: a patched block.
        cond: the condition of the sample.
    """

    def __init__(self, block: Any, cond: Any):
        family = block.actvar.family
        self.cond = cond
        self.modulation = _modulation(block, cond)
        self.qkv_bias = family.qkv_bias(block)
        self.head_scale = family.head_scale(block)
        self.kv_buffer: KVBuffer | None = None
        self.rows: int | None = None

    def keep_rows(self, rows: int) -> None:
        """Keep the first `rows` rows of all values, those with the class."""
        self.modulation = tuple(part[:rows].contiguous() for part in self.modulation)
        self.rows = rows

    def read_weights(self, block: Any) -> None:
        """Compute the values that depend on weights alone anew, where an adapter's weights take their place."""
        self.qkv_bias, self.head_scale = block.actvar.family.qkv_bias(block), block.actvar.family.head_scale(block)

    def kv_buffer_after(self, past: KVBuffer | None, v: Tensor, capacity: int, cache: BlockCache) -> KVBuffer:
        """Return the K/V buffer of the sample.

        The first call takes the kept buffer, or a new one where the kept one does not fit, and copies `past` into it.

        Args:
            past: cached keys and values, each `[R, H, P, d]`, or None.
            v: values of the scale, `[R, H, T, d]`.
            capacity: rows that the buffer has room for.
            cache: where buffers are kept between samples.
        """
        if self.kv_buffer is None:
            self.kv_buffer = cache.take_kv_buffer((*v.shape[:2], capacity, v.shape[3]), v)
            if past is not None:
                for buffer, cached in zip(self.kv_buffer, past, strict=True):
                    buffer[:, :, : cached.shape[2]] = cached
        if self.rows is None:
            return self.kv_buffer
        keys, values = self.kv_buffer
        return keys[: self.rows], values[: self.rows]


class Modulations:
    """Compute AdaLN of all blocks of a sample at once, when the first of them asks.

    Args:
        family: the family of the model.
        blocks: its blocks without wrappers.
    """

    def __init__(self, family: Family, blocks: Sequence[Any]):
        self.family, self.blocks = family, blocks
        self.cond: Any = None
        self.of_blocks: Sequence[tuple[Tensor, ...]] | None = None
        self.head: tuple[Any, Any] = (None, None)

    def of(self, block: Any, cond: Any) -> tuple[Tensor, ...]:
        """Return `Family.modulation` of a block under `cond`."""
        state = block.actvar
        # with other weights at early scales, those of the blocks behind are not in place yet
        if state.block_index == 0 and not state.shared.first_tuned:
            self.cond, self.of_blocks = cond, self.family.modulations(self.blocks, cond)
        if self.of_blocks is None or self.cond is not cond:
            return self.family.modulation(block, cond)
        return self.of_blocks[state.block_index]

    def of_head(self, cond: Any, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, or what it returned before for the same condition."""
        if self.head[0] is not cond:
            self.head = cond, compute()
        return self.head[1]


def _modulation(block: Any, cond: Any) -> tuple[Tensor, ...]:
    """Return `SampleState.modulation` of the block under `cond`."""
    together = block.actvar.shared.modulations
    modulation = block.actvar.family.modulation(block, cond) if together is None else together.of(block, cond)
    if choose_fused(modulation[0]).packs_weights:  # C++ reads contiguous float32
        modulation = tuple(part.float().contiguous() for part in modulation)
    return modulation


class BlockCache:
    """Keep a block's `SampleState` between two scales, and its K/V buffer between two samples.

    Copies and pickles are empty.
    """

    def __init__(self):
        self.state: SampleState | None = None
        self.version: Tensor | None = None
        self.kv_buffer: KVBuffer | None = None

    def take_kv_buffer(self, shape: tuple[int, ...], like: Tensor) -> KVBuffer:
        """Return keys and values of `shape`, in the dtype and on the device of `like`.

        They are the kept buffer if it fits, otherwise a new one. In either case the cache gives up the kept buffer.
        """
        kept, self.kv_buffer = self.kv_buffer, None
        if kept is not None:
            wanted = (shape, like.dtype, like.device, torch.is_inference_mode_enabled())
            if (kept[0].shape, kept[0].dtype, kept[0].device, kept[0].is_inference()) == wanted:
                return kept
            del kept
        return like.new_empty(shape), like.new_empty(shape)

    def continued(self, block: Any, cond: Any, scale: Scale) -> SampleState:
        """Return the state that the previous scale kept where `cond` is still its condition, otherwise a new one."""
        state = self.state
        is_next = _is_sampling(block) and self.version is not None and self.version is _version(block)
        if is_next and state is not None and state.cond is cond:
            if MODULATION in block.actvar.called:  # the dense model calls AdaLN at every scale
                state.modulation = _modulation(block, cond)
            if scale.index == block.actvar.shared.first_tuned:
                state.read_weights(block)
            return state
        return SampleState(block, cond)

    def keep(self, block: Any, state: SampleState, scale: Scale) -> None:
        """Keep `state` for the scale after `scale`; call it after the block's K/V cache was written."""
        goes_on = _is_sampling(block) and not scale.is_last
        self.state = state if goes_on else None
        self.version = _version(block) if goes_on else None
        if scale.is_last and block.actvar.shared.keeps_kv_buffer:
            self.kv_buffer = state.kv_buffer

    def forget(self) -> None:
        """Free the state that is kept between two scales."""
        self.state = self.version = None

    def __deepcopy__(self, _memo) -> BlockCache:
        return BlockCache()

    def __reduce__(self):
        return BlockCache, ()


def _version(block: Any) -> Tensor | None:
    """Return the tensor that identifies the K/V cache at the next scale."""
    return block.actvar.family.cache(block).version


def _is_sampling(block: Any) -> bool:
    """Return whether the K/V cache is on, without gradients and outside of a compiler."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return block.actvar.family.cache(block).is_on
