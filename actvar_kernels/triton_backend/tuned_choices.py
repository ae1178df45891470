"""Look up what a call takes by the table that `ACTVAR_TUNED` names.

An expert FFN takes the entry of its type, channels and expert width whose number of tokens is nearest, by at most a
factor of two. Other calls take what `tiles.py` says. A convolution takes the entry of its type, sizes and epilogue with
the nearest number of images, by the same factor. Others are PyTorch's. Attention takes the entry of its type and sizes
with the nearest number of heads, or what `attention_tiles.py` says. A dense block takes 5 launches where the entry of
its type and sizes with the nearest number of rows says so. Kernels are launched early only if the table says so.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import torch

from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE
from actvar_kernels.triton_backend import conv_tiles, tiles
from actvar_kernels.triton_backend.conv_tiles import ConvTiles
from actvar_kernels.triton_backend.tuning_table import Entry, Table, read_table

FACTOR = 2.0
"""Most by which the number of a call and that of its entry differ."""


def tuned_expert_ffn(u: torch.Tensor, width: int) -> Entry | None:
    """Return the entry for a call; None without a table or a near entry.

    Args:
        u: rows `[T, C]`, float32, float16 or bfloat16.
        width: hidden units of an expert.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    return _entry("expert_ffn", u, (_name(u.dtype), u.shape[1], width), len(u))


def tuned_conv3x3(x: torch.Tensor, outputs: int, fused: bool) -> ConvTiles | None:
    """Return the tiles of a convolution; None where PyTorch's library runs.

    Args:
        x: images `[B, C, H, W]`, float32, float16 or bfloat16.
        outputs: channels of the result.
        fused: whether a residual is added and measured.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    images, inputs, height, width = x.shape
    entry = _entry("conv3x3", x, (_name(x.dtype), height, width, inputs, outputs, int(fused)), images)
    if entry is None or not entry.pixels:
        return None
    found = conv_tiles.candidates(tiles.architecture(x), x.dtype, inputs, outputs)
    return next(size for size in found if size.pixels == entry.pixels)


def tuned_attention(q: torch.Tensor, dtype: torch.dtype, keys: int) -> tuple[int, int] | None:
    """Return queries and keys of a tile of attention; None without a near entry.

    Args:
        q: queries `[R, H, K, d]`, on the GPU.
        dtype: of the values, float32, float16 or bfloat16.
        keys: cached keys and own ones.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    R, H, queries, head_dim = q.shape
    entry = _entry("attention", q, (_name(dtype), head_dim, queries, keys), R * H)
    return None if entry is None else (entry.tile_queries, entry.tile_keys)


def tuned_few_rows(x: torch.Tensor, hidden: int) -> bool:
    """Return whether a dense block takes 5 launches; False without a near entry.

    Args:
        x: rows `[R, L, C]`, float32, float16 or bfloat16.
        hidden: units of the FFN.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    R, L, C = x.shape
    entry = _entry("few_rows", x, (_name(x.dtype), C, hidden), R * L)
    return entry is not None and bool(entry.fused)


def tuned_early_launch(tensor: torch.Tensor) -> bool:
    """Return whether kernels are launched early; False without a table.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    table = _table_of(tensor)
    return table is not None and bool(table.early_launch)


def _entry(kind: str, tensor: torch.Tensor, shape: tuple, number: int) -> Any:
    """Return the entry of a call, None without a table or an entry within a factor of `FACTOR`.

    Args:
        kind: field of the table that has the entries.
        tensor: one of the call's.
        shape, number: what the entries call so.
    """
    table = _table_of(tensor)

    def distance(entry: Any) -> float:
        return abs(math.log(entry.number / number))

    same = [] if table is None else [entry for entry in getattr(table, kind) if entry.shape == shape]
    near = [entry for entry in same if distance(entry) <= math.log(FACTOR)]
    return min(near, key=distance, default=None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table_of(tensor: torch.Tensor) -> Table | None:
    """Return the table that `ACTVAR_TUNED` names for the GPU of a tensor; None without one, or with one of a CPU."""
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return None
    name = torch.cuda.get_device_name(tensor.device) if torch.cuda.is_available() else None
    return _table(path, name, tiles.architecture(tensor))


@functools.cache
def _table(path: str, device: str | None, capability: int) -> Table | None:
    table = read_table(Path(path))
    if table is None:
        return None
    if table.capability != capability or device not in (None, table.device):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: {path} was measured on {table.device}, sm_{table.capability}; this is {device}, "
            f"sm_{capability}: run python -m actvar_kernels.tools.tune here, or unset the variable"
        )
    return table
