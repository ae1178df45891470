"""Keep what a block computes once per sample from scale to scale: AdaLN, biases, and the memory of the K/V cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from actvar.families.base import MODULATION
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused

KVBuffer = tuple[Tensor, Tensor]
"""Preallocated keys and values, each `[R, H, capacity, d]`, the cache first."""


class SampleState:
    """What one block computes once per sample.

    Args:
        cond: the condition of the sample.

    `modulation` is gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`, for C++ in float32; `qkv_bias`
    `[3C]`; `head_scale` `[H]`, or None without QK norm; `kv_buffer` is None until keys and values are cached.
    """

    def __init__(self, block: nn.Module, cond: Any):
        family = block.actvar.family
        self.cond = cond
        self.modulation = _modulation(block, cond)
        self.qkv_bias = family.qkv_bias(block)
        self.head_scale = family.head_scale(block)
        self.kv_buffer: KVBuffer | None = None

    def kv_buffer_after(self, past: KVBuffer | None, v: Tensor, capacity: int, cache: BlockCache) -> KVBuffer:
        """Return the buffer, which begins with the cache `past`.

        On first use it is the one that was kept, or a new one if that does not fit values like `v` `[R, H, T, d]`.
        """
        if self.kv_buffer is None:
            self.kv_buffer = cache.take_kv_buffer((*v.shape[:2], capacity, v.shape[3]), v)
            if past is not None:
                for buffer, cached in zip(self.kv_buffer, past, strict=True):
                    buffer[:, :, : cached.shape[2]] = cached
        return self.kv_buffer


def _modulation(block: nn.Module, cond: Any) -> tuple[Tensor, ...]:
    """Return what `SampleState.modulation` is."""
    modulation = block.actvar.family.modulation(block, cond)
    if choose_fused(modulation[0]).packs_weights:  # beside vectors in float32 without gaps
        modulation = tuple(part.float().contiguous() for part in modulation)
    return modulation


class BlockCache:
    """Keep a block's `SampleState` between two scales, and between two samples its K/V buffer.

    Copies and pickles are empty.
    """

    def __init__(self):
        self.state: SampleState | None = None
        self.key: Tensor | None = None
        self.kv_buffer: KVBuffer | None = None

    def take_kv_buffer(self, shape: tuple[int, ...], like: Tensor) -> KVBuffer:
        """Return keys and values of `shape`: those kept if they fit, which are kept no longer, otherwise new ones."""
        kept, self.kv_buffer = self.kv_buffer, None
        if kept is not None:
            wanted = (shape, like.dtype, like.device, torch.is_inference_mode_enabled())
            if (kept[0].shape, kept[0].dtype, kept[0].device, kept[0].is_inference()) == wanted:
                return kept
            del kept
        return like.new_empty(shape), like.new_empty(shape)

    def continued(self, block: nn.Module, cond: Any) -> SampleState:
        """Return the state that the previous scale kept if this call goes on from it, otherwise a new one."""
        if _is_sampling(block) and self.key is not None and self.key is _key(block) and self.state.cond is cond:
            if MODULATION in block.actvar.called:  # which the dense model calls at every scale
                self.state.modulation = _modulation(block, cond)
            return self.state
        return SampleState(block, cond)

    def keep(self, block: nn.Module, state: SampleState, scale: Scale) -> None:
        """Keep `state` for the next scale, after the block's K/V cache was written."""
        goes_on = _is_sampling(block) and not scale.is_last
        self.state = state if goes_on else None
        self.key = _key(block) if goes_on else None
        if scale.is_last and block.actvar.shared.keeps_kv_buffer:
            self.kv_buffer = state.kv_buffer

    def forget(self) -> None:
        """Free what is kept between two scales."""
        self.state = self.key = None

    def __deepcopy__(self, _memo) -> BlockCache:
        return BlockCache()

    def __reduce__(self):
        return BlockCache, ()


def _key(block: nn.Module) -> Tensor | None:
    """Return the tensor by which the K/V cache is known again."""
    return block.actvar.family.cache(block).key


def _is_sampling(block: nn.Module) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return block.actvar.family.cache(block).is_on
