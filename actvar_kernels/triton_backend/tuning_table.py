"""Read measured choices for the expert FFN, convolutions, attention and launches on one GPU.

`actvar_kernels.tools.tune` writes the table as JSON, and `ACTVAR_TUNED` names it. An expert FFN takes the entry of its
type, channels and expert width whose number of tokens is nearest, by at most a factor of two. Other calls take what
`tiles.py` says. A convolution takes the entry of its type, sizes and epilogue with the nearest number of images, by the
same factor. Others are PyTorch's. Attention takes the entry of its type and sizes with the nearest number of heads, or
what `attention_tiles.py` says. Kernels are launched early only if the table says so.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from actvar_kernels.cpu_backend import table_file
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE, GPU, of_fields
from actvar_kernels.triton_backend import attention_tiles, conv_tiles, tiles
from actvar_kernels.triton_backend.conv_tiles import ConvTiles

SCHEDULES = ("dense", "tile_list")
FACTOR = 2.0
FIRST_WITH_EARLY_LAUNCH = 90
"""Lowest compute capability with programmatic dependent launch."""


class Entry(NamedTuple):
    """Say what was fastest at a shape.

    Attributes:
        dtype: type of the numbers.
        tokens, channels: rows and columns of the input.
        width: hidden units of an expert.
        schedule: one of `SCHEDULES`.
        rows, columns: name one of `tiles.expert_ffn_candidates`.
        milliseconds: time of a call.
    """

    dtype: str
    tokens: int
    channels: int
    width: int
    schedule: str
    rows: int
    columns: int
    milliseconds: float


class ConvEntry(NamedTuple):
    """Say what was fastest for a 3x3 convolution.

    Attributes:
        dtype: type of the numbers.
        height, width, inputs, outputs: pixels and channels of an image.
        fused: whether a residual is added and measured in the same call.
        images: number of images.
        pixels: names one of `conv_tiles.candidates`; 0 for PyTorch's library.
        milliseconds: time of a call.
    """

    dtype: str
    height: int
    width: int
    inputs: int
    outputs: int
    fused: int
    images: int
    pixels: int
    milliseconds: float


class AttentionEntry(NamedTuple):
    """Say what was fastest for attention without a mask.

    Attributes:
        dtype: type of the numbers.
        head_dim: channels of a head.
        queries, keys: of a head, with the cached keys.
        heads: heads of all sequences.
        tile_queries, tile_keys: name one of `attention_tiles.candidates`.
        milliseconds: time of a call.
    """

    dtype: str
    head_dim: int
    queries: int
    keys: int
    heads: int
    tile_queries: int
    tile_keys: int
    milliseconds: float


class Table(NamedTuple):
    """Hold what was measured on a GPU.

    Attributes:
        device: name of the GPU.
        capability: the one of `tiles.ARCHITECTURES` that it counts as.
        triton: version of Triton.
        expert_ffn, conv3x3, attention: the entries.
        early_launch: whether a block took less time with kernels that are launched early (`early_launch.py`), 0 or 1.
    """

    device: str
    capability: int
    triton: str
    expert_ffn: tuple[Entry, ...]
    conv3x3: tuple[ConvEntry, ...] = ()
    attention: tuple[AttentionEntry, ...] = ()
    early_launch: int = 0


def write_table(table: Table, path: Path) -> None:
    """Write the table; the file is complete or not there.

    Raises:
        OSError: it cannot be written.
    """
    entries = {
        "expert_ffn": [entry._asdict() for entry in table.expert_ffn],
        "conv3x3": [entry._asdict() for entry in table.conv3x3],
        "attention": [entry._asdict() for entry in table.attention],
    }
    table_file.write(GPU, table._asdict() | entries, path)


def read_table(path: Path) -> Table | None:
    """Read and check a table; None where the file holds that of a CPU.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table, or names a schedule or tiles that are not shipped.
    """
    kind, content = table_file.read(path)
    if kind != GPU:
        return None
    table = of_fields(Table, content, f"{path}:")
    if table.capability not in tiles.ARCHITECTURES:
        supported = ", ".join(map(str, tiles.ARCHITECTURES))
        raise ValueError(f"{path}: capability: expected one of {supported}, got {table.capability}")
    entries = tuple(
        _checked_entry(of_fields(Entry, entry, f"{path}: expert_ffn[{position}]:"), table.capability, path, position)
        for position, entry in enumerate(table.expert_ffn)
    )
    convolutions = tuple(
        _checked_convolution(
            of_fields(ConvEntry, entry, f"{path}: conv3x3[{position}]:"),
            table.capability,
            f"{path}: conv3x3[{position}]",
        )
        for position, entry in enumerate(table.conv3x3)
    )
    attention = tuple(
        _checked_attention(
            of_fields(AttentionEntry, entry, f"{path}: attention[{position}]:"),
            table.capability,
            f"{path}: attention[{position}]",
        )
        for position, entry in enumerate(table.attention)
    )
    shapes = [entry[:4] for entry in entries]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"{path}: expected one entry for a dtype, tokens, channels and width, got several")
    shapes = [entry[:7] for entry in convolutions]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"{path}: conv3x3: expected one entry for a dtype, sizes, fused and images, got several")
    shapes = [entry[:5] for entry in attention]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"{path}: attention: expected one entry for a dtype, sizes and heads, got several")
    choices = (0, 1) if table.capability >= FIRST_WITH_EARLY_LAUNCH else (0,)
    if table.early_launch not in choices:
        expected = " or ".join(map(str, choices))
        raise ValueError(
            f"{path}: early_launch: expected {expected} on sm_{table.capability}, got {table.early_launch}"
        )
    return table._replace(expert_ffn=entries, conv3x3=convolutions, attention=attention)


def _checked_entry(entry: Entry, capability: int, path: Path, position: int) -> Entry:
    """Return an entry; raise ValueError unless it names what is shipped."""
    where = f"{path}: expert_ffn[{position}]"
    dtype = _checked_dtype(entry.dtype, where)
    if min(entry.tokens, entry.channels, entry.width) < 1:
        raise ValueError(f"{where}: expected tokens, channels and width above 0")
    if entry.schedule not in SCHEDULES:
        raise ValueError(f"{where}: schedule: expected one of {', '.join(SCHEDULES)}, got {entry.schedule!r}")
    sizes = [
        (size.rows, size.down.columns) for size in tiles.expert_ffn_candidates(capability, dtype, entry.width, True)
    ]
    if (entry.rows, entry.columns) not in sizes:
        raise ValueError(f"{where}: rows, columns: expected one of {sizes}, got {(entry.rows, entry.columns)}")
    return entry


def _checked_convolution(entry: ConvEntry, capability: int, where: str) -> ConvEntry:
    """Return an entry; raise ValueError unless it names what is shipped."""
    dtype = _checked_dtype(entry.dtype, where)
    if min(entry.height, entry.width, entry.inputs, entry.outputs, entry.images) < 1:
        raise ValueError(f"{where}: expected height, width, inputs, outputs and images above 0")
    if entry.fused not in (0, 1):
        raise ValueError(f"{where}: fused: expected 0 or 1, got {entry.fused}")
    sizes = [0, *(size.pixels for size in conv_tiles.candidates(capability, dtype, entry.inputs, entry.outputs))]
    if entry.pixels not in sizes:
        raise ValueError(f"{where}: pixels: expected one of {sizes}, got {entry.pixels}")
    return entry


def _checked_attention(entry: AttentionEntry, capability: int, where: str) -> AttentionEntry:
    """Return an entry; raise ValueError unless it names what is shipped."""
    dtype = _checked_dtype(entry.dtype, where)
    if min(entry.head_dim, entry.queries, entry.keys, entry.heads) < 1:
        raise ValueError(f"{where}: expected head_dim, queries, keys and heads above 0")
    candidates = attention_tiles.candidates(capability, dtype, entry.head_dim)
    sizes, found = [(size.queries, size.keys) for size in candidates], (entry.tile_queries, entry.tile_keys)
    if found not in sizes:
        raise ValueError(f"{where}: tile_queries, tile_keys: expected one of {sizes}, got {found}")
    return entry


def _checked_dtype(name: str, where: str) -> torch.dtype:
    """Return the dtype of a name; raise ValueError unless kernels take it."""
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: dtype: expected float32, float16 or bfloat16, got {name!r}")
    return dtype


def tuned_expert_ffn(u: torch.Tensor, width: int) -> Entry | None:
    """Return the entry for a call in the table that `ACTVAR_TUNED` names; None without a table or a near entry.

    Args:
        u: rows `[T, C]`, float32, float16 or bfloat16.
        width: hidden units of an expert.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another GPU.
    """
    table = _table_of(u)
    if table is None:
        return None
    tokens, channels = u.shape
    key = (_name(u.dtype), channels, width)
    same = {entry.tokens: entry for entry in table.expert_ffn if (entry.dtype, entry.channels, entry.width) == key}
    return _nearest(same, tokens)


def tuned_conv3x3(x: torch.Tensor, outputs: int, fused: bool) -> ConvTiles | None:
    """Return the tiles of a convolution by the table that `ACTVAR_TUNED` names; None where PyTorch's library runs.

    Args:
        x: images `[B, C, H, W]`, float32, float16 or bfloat16.
        outputs: channels of the result.
        fused: whether a residual is added and measured.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another GPU.
    """
    table = _table_of(x)
    if table is None:
        return None
    images, inputs, height, width = x.shape
    key = (_name(x.dtype), height, width, inputs, outputs, int(fused))
    entry = _nearest({entry.images: entry for entry in table.conv3x3 if entry[:6] == key}, images)
    if entry is None or not entry.pixels:
        return None
    found = conv_tiles.candidates(table.capability, x.dtype, inputs, outputs)
    return next(size for size in found if size.pixels == entry.pixels)


def tuned_attention(q: torch.Tensor, dtype: torch.dtype, keys: int) -> tuple[int, int] | None:
    """Return queries and keys of a tile of attention by the table of `ACTVAR_TUNED`; None without a near entry.

    Args:
        q: queries `[R, H, K, d]`, on the GPU.
        dtype: of the values, float32, float16 or bfloat16.
        keys: cached keys and own ones.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another GPU.
    """
    table = _table_of(q)
    if table is None:
        return None
    R, H, queries, head_dim = q.shape
    key = (_name(dtype), head_dim, queries, keys)
    entry = _nearest({entry.heads: entry for entry in table.attention if entry[:4] == key}, R * H)
    return None if entry is None else (entry.tile_queries, entry.tile_keys)


def tuned_early_launch(tensor: torch.Tensor) -> bool:
    """Return whether the table that `ACTVAR_TUNED` names has kernels launched early; False without a table.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another GPU.
    """
    table = _table_of(tensor)
    return table is not None and bool(table.early_launch)


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


T = TypeVar("T")


def _nearest(entries: dict[int, T], number: int) -> T | None:
    """Return the entry whose number is nearest, None where none is within a factor of `FACTOR`."""

    def distance(measured: int) -> float:
        return abs(math.log(measured / number))

    near = [measured for measured in entries if distance(measured) <= math.log(FACTOR)]
    return entries[min(near, key=distance)] if near else None
