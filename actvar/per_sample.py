"""What a block computes once per sample and keeps from scale to scale: AdaLN, biases, and the K/V cache's room."""

from __future__ import annotations

import torch
from torch import nn

from actvar.families import var as family
from actvar.schedule import Scale


class PerSample:
    """State of one block during one sample.

    `modulation`: gamma1, gamma2, scale1, scale2, shift1, shift2, each `[R, 1, C]`; `qkv_bias` `[3C]`; `head_scale`
    `[H]`, or None without QK norm; `room`: preallocated keys and values `[R, H, capacity, d]`, the cache first.
    """

    def __init__(self, block: nn.Module, cond: torch.Tensor):
        self.cond = cond
        self.modulation = family.modulation(block, cond)
        self.qkv_bias = family.qkv_bias(block)
        self.head_scale = family.head_scale(block)
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def room_after(
        self, past: tuple[torch.Tensor, torch.Tensor] | None, v: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The room, which begins with the cache `past`; made on first use, for values like `v` `[R, H, T, d]`."""
        if self.room is None:
            self.room = tuple(v.new_empty(*v.shape[:2], capacity, v.shape[3]) for _ in range(2))
            if past is not None:
                for buffer, cached in zip(self.room, past, strict=True):
                    buffer[:, :, : cached.shape[2]] = cached
        return self.room


class Kept:
    """A block's `PerSample` between two scales, and the cache that it goes with; empty in copies and pickles."""

    def __init__(self):
        self.state: PerSample | None = None
        self.cache: torch.Tensor | None = None

    def __deepcopy__(self, _memo) -> Kept:
        return Kept()

    def __reduce__(self):
        return Kept, ()


def continued(block: nn.Module, cond: torch.Tensor) -> PerSample:
    """The state that the block's previous scale kept if this call goes on from it, otherwise a new one."""
    kept: Kept = block.actvar.kept
    if _is_sampling(block) and kept.cache is not None and kept.cache is block.attn.cached_k and kept.state.cond is cond:
        return kept.state
    return PerSample(block, cond)


def keep(block: nn.Module, state: PerSample, scale: Scale) -> None:
    """Keep `state` for the next scale, after the block's cache was written."""
    goes_on = _is_sampling(block) and not scale.is_last
    block.actvar.kept.state = state if goes_on else None
    block.actvar.kept.cache = block.attn.cached_k if goes_on else None


def forget(block: nn.Module) -> None:
    """Free what the block keeps between two scales."""
    block.actvar.kept.state = block.actvar.kept.cache = None


def _is_sampling(block: nn.Module) -> bool:
    return block.attn.caching and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
