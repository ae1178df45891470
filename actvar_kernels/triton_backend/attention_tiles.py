"""List the tiles of attention: those that it takes by itself, and those of which a measured table takes one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from actvar_kernels.triton_backend.forced import Forced
from actvar_kernels.triton_backend.tiles import RDNA


class AttentionTiles(NamedTuple):
    """Describe attention.

    Attributes:
        queries, keys, own_keys: queries, cached keys and own keys of a tile.
        warps: warps of a program.
        stages, own_stages: pipeline stages of the loops over cached and own keys.
    """

    queries: int
    keys: int
    own_keys: int
    warps: int
    stages: int
    own_stages: int


def attention_tiles(
    arch: int, dtype: torch.dtype, head_dim: int, masked: bool, measured: tuple[int, int] | None = None
) -> AttentionTiles:
    """Return tiles without spilled registers for head sizes up to 128, with a mask too.

    Args:
        arch: compute capability.
        dtype: float32, float16 or bfloat16.
        head_dim: channels of a head.
        masked: whether there is a mask.
        measured: queries and keys of the tiles that were measured to be fastest without a mask, or None.
    """
    if masked:
        return _by_itself(arch, dtype, head_dim, masked)
    if _forced.value is not None:
        return _forced.value
    sizes = candidates(arch, dtype, head_dim)
    return next((size for size in sizes if (size.queries, size.keys) == measured), sizes[0])


def _by_itself(arch: int, dtype: torch.dtype, head_dim: int, masked: bool) -> AttentionTiles:
    """Return tiles where nothing was measured; float32 has no tensor cores."""
    wide = head_dim > 64
    if dtype == torch.float32:
        queries, keys, own_keys = (16, 16, 16) if wide or arch == RDNA else (32, 16, 16)
        return AttentionTiles(queries, keys, own_keys, warps=8, stages=2, own_stages=1)
    if wide:
        if arch in (90, 100) and not masked:
            return AttentionTiles(queries=128, keys=64, own_keys=64, warps=8, stages=2, own_stages=1)
        queries = 32 if masked else 64
        return AttentionTiles(queries, keys=32, own_keys=32, warps=queries // 8, stages=2, own_stages=1)
    if arch == RDNA:
        return AttentionTiles(queries=64, keys=32, own_keys=32, warps=8, stages=2, own_stages=1)
    if arch == 90:
        return AttentionTiles(queries=64, keys=64, own_keys=64, warps=4, stages=3, own_stages=2)
    return AttentionTiles(queries=64, keys=32 if masked else 64, own_keys=32, warps=4, stages=3, own_stages=1)


def candidates(arch: int, dtype: torch.dtype, head_dim: int) -> list[AttentionTiles]:
    """Return the tiles without a mask, of which the first are taken where nothing was measured.

    Queries and keys tell them apart. Tiles of 128 queries read and normalise the keys of a head half as often as those
    of 64. They were compiled for heads of 64 channels, which are VAR's.

    Args:
        arch, dtype, head_dim: as in `attention_tiles`.
    """
    first = _by_itself(arch, dtype, head_dim, masked=False)
    if dtype == torch.float32 or arch == RDNA or head_dim != 64:
        return [first]
    large = AttentionTiles(queries=128, keys=64, own_keys=64, warps=8, stages=3, own_stages=1)
    return [first, large, large._replace(keys=32, own_keys=32)]


_forced = Forced[AttentionTiles]()


def using_attention_tiles(tile: AttentionTiles) -> AbstractContextManager[None]:
    """Make attention without a mask take `tile` for the duration of the context, whatever a table says."""
    return _forced.using(tile)
