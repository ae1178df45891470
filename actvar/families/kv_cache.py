"""Read and write the K/V cache of a block."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """Read and write the K/V cache of one block."""

    @property
    def is_on(self) -> bool:
        """Return whether keys and values are kept for later scales."""
        ...

    @property
    def rows(self) -> int:
        """Return the number of cached rows."""
        ...

    @property
    def version(self) -> Tensor | None:
        """Return a tensor that every write replaces, so that its identity tells a change; None for an empty cache."""
        ...

    def start(self) -> None:
        """Begin with an empty cache."""
        ...

    def drop(self) -> None:
        """Empty the cache and stop caching."""
        ...

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return the cached keys and values, each `[R, H, P, d]`, or None when nothing is cached."""
        ...

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Replace the cache by `keys` and `values`, each `[R, H, P, d]`, stored in the block's own layout."""
        ...


class AttentionCache(NamedTuple):
    """Read and write the K/V cache that a block keeps in its attention module; see `Cache`."""

    attn: Any

    def tokens_first(self, dtype: torch.dtype) -> bool:
        """Return whether a cache in `dtype` is `[R, tokens, H, d]`, as flash-attention and xformers keep it.

        The public code of VAR uses flash-attention only for dtypes other than float32.
        """
        flags = vars(self.attn)  # faster than `getattr` where a flag is missing
        return (flags.get("using_flash", False) and dtype != torch.float32) or flags.get("using_xform", False)

    @property
    def is_on(self) -> bool:
        return self.attn.caching

    @property
    def rows(self) -> int:
        past = self.read()
        return 0 if past is None else past[0].shape[2]

    @property
    def version(self) -> Tensor | None:
        return self.attn.cached_k

    def start(self) -> None:
        self.attn.kv_caching(True)

    def drop(self) -> None:
        self.attn.kv_caching(False)

    def read(self) -> tuple[Tensor, Tensor] | None:
        attn = self.attn
        keys, values = attn.cached_k, attn.cached_v
        if not attn.caching or keys is None:
            return None
        swap = self.tokens_first(values.dtype)
        return (keys.transpose(1, 2), values.transpose(1, 2)) if swap else (keys, values)

    def write(self, keys: Tensor, values: Tensor) -> None:
        attn = self.attn
        if attn.caching:
            swap = self.tokens_first(values.dtype)
            attn.cached_k = keys.transpose(1, 2) if swap else keys
            attn.cached_v = values.transpose(1, 2) if swap else values
