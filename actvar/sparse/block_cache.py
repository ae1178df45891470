"""What a block computes once per sample and keeps from scale to scale: AdaLN, biases, and the K/V cache's room."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
from actvar.sparse.schedule import Scale
from actvar_kernels import choose_fused


class PerSample:
    """State of one block during one sample.

    `modulation`: gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`, for C++ in float32; `qkv_bias`
    `[3C]`; `head_scale` `[H]`, or None without QK norm; `room`: preallocated keys and values `[R, H, capacity, d]`, the
    cache first.
    """

    def __init__(self, block: nn.Module, cond: torch.Tensor):
        self.cond = cond
        self.modulation = _modulation(block, cond)
        self.qkv_bias = family.qkv_bias(block)
        self.head_scale = family.head_scale(block)
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def room_after(
        self, past: tuple[torch.Tensor, torch.Tensor] | None, v: torch.Tensor, capacity: int, kept: Kept
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The room, which begins with the cache `past`; on first use the one that was kept, or a new one if that does
        not fit values like `v` `[R, H, T, d]`."""
        if self.room is None:
            self.room = kept.take_room((*v.shape[:2], capacity, v.shape[3]), v)
            if past is not None:
                for buffer, cached in zip(self.room, past, strict=True):
                    buffer[:, :, : cached.shape[2]] = cached
        return self.room


def _modulation(block: nn.Module, cond: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what `PerSample.modulation` is."""
    modulation = family.modulation(block, cond)
    if choose_fused(cond).packs_weights:  # beside vectors in float32 without gaps
        modulation = tuple(part.float().contiguous() for part in modulation)
    return modulation


class Kept:
    """A block's `PerSample` between two scales, the cache that it goes with, and between two samples the cache's room;
    empty in copies and pickles."""

    def __init__(self):
        self.state: PerSample | None = None
        self.cache: torch.Tensor | None = None
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def take_room(self, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `shape`: those kept if they fit, which are kept no longer, otherwise new ones."""
        room, self.room = self.room, None
        if room is not None:
            wanted = (shape, like.dtype, like.device, torch.is_inference_mode_enabled())
            if (room[0].shape, room[0].dtype, room[0].device, room[0].is_inference()) == wanted:
                return room
            del room
        return like.new_empty(shape), like.new_empty(shape)

    def __deepcopy__(self, _memo) -> Kept:
        return Kept()

    def __reduce__(self):
        return Kept, ()


def continued(block: nn.Module, cond: torch.Tensor) -> PerSample:
    """The state that the block's previous scale kept if this call goes on from it, otherwise a new one."""
    kept: Kept = block.actvar.kept
    if _is_sampling(block) and kept.cache is not None and kept.cache is block.attn.cached_k and kept.state.cond is cond:
        if "ada_lin" in block.actvar.called:  # which the dense model calls at every scale
            kept.state.modulation = _modulation(block, cond)
        return kept.state
    return PerSample(block, cond)


def keep(block: nn.Module, state: PerSample, scale: Scale) -> None:
    """Keep `state` for the next scale, after the block's cache was written."""
    goes_on = _is_sampling(block) and not scale.is_last
    block.actvar.kept.state = state if goes_on else None
    block.actvar.kept.cache = block.attn.cached_k if goes_on else None
    if scale.is_last and block.actvar.shared.reuses_room:
        block.actvar.kept.room = state.room


def forget(block: nn.Module) -> None:
    """Free what the block keeps between two scales."""
    block.actvar.kept.state = block.actvar.kept.cache = None


def _is_sampling(block: nn.Module) -> bool:
    return block.attn.caching and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
