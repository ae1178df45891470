"""Read and write the table of choices that were measured on one GPU, and check it.

`actvar_kernels.tools.tune` writes the table as JSON. `tuned_choices.py` says which calls take which entry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actvar_kernels.cpu_backend import table_file
from actvar_kernels.cpu_backend.table_file import GPU, of_fields
from actvar_kernels.triton_backend import attention_tiles, conv_tiles, tiles

SCHEDULES = ("dense", "tile_list")
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

    @property
    def shape(self) -> tuple:
        """Return what a call must have in common with the entry."""
        return self.dtype, self.channels, self.width

    @property
    def number(self) -> int:
        """Return the tokens."""
        return self.tokens


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

    @property
    def shape(self) -> tuple:
        """Return what a call must have in common with the entry."""
        return self[:6]

    @property
    def number(self) -> int:
        """Return the images."""
        return self.images


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

    @property
    def shape(self) -> tuple:
        """Return what a call must have in common with the entry."""
        return self[:4]

    @property
    def number(self) -> int:
        """Return the heads."""
        return self.heads


class FewRowsEntry(NamedTuple):
    """Say whether a dense block of few rows took less time in 5 launches than in 7.

    Attributes:
        dtype: type of the numbers.
        channels, hidden: of a row, and units of the FFN.
        rows: of all sequences.
        fused: 1 for 5 launches, 0 for 7.
        milliseconds: time of a block.
    """

    dtype: str
    channels: int
    hidden: int
    rows: int
    fused: int
    milliseconds: float

    @property
    def shape(self) -> tuple:
        """Return what a call must have in common with the entry."""
        return self[:3]

    @property
    def number(self) -> int:
        """Return the rows."""
        return self.rows


class Table(NamedTuple):
    """Hold what was measured on a GPU.

    Attributes:
        device: name of the GPU.
        capability: the one of `tiles.ARCHITECTURES` that it counts as.
        triton: version of Triton.
        expert_ffn, conv3x3, attention, few_rows: the entries.
        early_launch: whether a block took less time with kernels that are launched early (`early_launch.py`), 0 or 1.
    """

    device: str
    capability: int
    triton: str
    expert_ffn: tuple[Entry, ...]
    conv3x3: tuple[ConvEntry, ...] = ()
    attention: tuple[AttentionEntry, ...] = ()
    few_rows: tuple[FewRowsEntry, ...] = ()
    early_launch: int = 0


def write_table(table: Table, path: Path) -> None:
    """Write the table; the file is complete or not there.

    Raises:
        OSError: it cannot be written.
    """
    entries = {name: [entry._asdict() for entry in getattr(table, name)] for name in _KINDS}
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
    found = {name: _checked(name, getattr(table, name), table.capability, path) for name in _KINDS}
    choices = (0, 1) if table.capability >= FIRST_WITH_EARLY_LAUNCH else (0,)
    if table.early_launch not in choices:
        expected = " or ".join(map(str, choices))
        raise ValueError(
            f"{path}: early_launch: expected {expected} on sm_{table.capability}, got {table.early_launch}"
        )
    return table._replace(**found)


def _checked(name: str, content: tuple, capability: int, path: Path) -> tuple:
    """Return the entries of one kind.

    Args:
        name: field of the table.
        content: what was read of it.
        capability: of the GPU.
        path: of the table, for messages.

    Raises:
        ValueError: an entry has other fields, names what is not shipped, or there are two for a shape.
    """
    kind, check = _KINDS[name]
    entries = []
    for position, fields in enumerate(content):
        where = f"{path}: {name}[{position}]"
        entries.append(of_fields(kind, fields, f"{where}:"))
        check(entries[-1], capability, where)
    shapes = [(entry.shape, entry.number) for entry in entries]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"{path}: {name}: expected one entry for a dtype and sizes, got several")
    return tuple(entries)


def _expect_expert_ffn(entry: Entry, capability: int, where: str) -> None:
    """Raise ValueError unless an entry names what is shipped."""
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


def _expect_convolution(entry: ConvEntry, capability: int, where: str) -> None:
    """Raise ValueError unless an entry names what is shipped."""
    dtype = _checked_dtype(entry.dtype, where)
    if min(entry.height, entry.width, entry.inputs, entry.outputs, entry.images) < 1:
        raise ValueError(f"{where}: expected height, width, inputs, outputs and images above 0")
    if entry.fused not in (0, 1):
        raise ValueError(f"{where}: fused: expected 0 or 1, got {entry.fused}")
    sizes = [0, *(size.pixels for size in conv_tiles.candidates(capability, dtype, entry.inputs, entry.outputs))]
    if entry.pixels not in sizes:
        raise ValueError(f"{where}: pixels: expected one of {sizes}, got {entry.pixels}")


def _expect_attention(entry: AttentionEntry, capability: int, where: str) -> None:
    """Raise ValueError unless an entry names what is shipped."""
    dtype = _checked_dtype(entry.dtype, where)
    if min(entry.head_dim, entry.queries, entry.keys, entry.heads) < 1:
        raise ValueError(f"{where}: expected head_dim, queries, keys and heads above 0")
    candidates = attention_tiles.candidates(capability, dtype, entry.head_dim)
    sizes, found = [(size.queries, size.keys) for size in candidates], (entry.tile_queries, entry.tile_keys)
    if found not in sizes:
        raise ValueError(f"{where}: tile_queries, tile_keys: expected one of {sizes}, got {found}")


def _expect_few_rows(entry: FewRowsEntry, _capability: int, where: str) -> None:
    """Raise ValueError unless an entry is one of a block."""
    _checked_dtype(entry.dtype, where)
    if min(entry.channels, entry.hidden, entry.rows) < 1:
        raise ValueError(f"{where}: expected channels, hidden and rows above 0")
    if entry.fused not in (0, 1):
        raise ValueError(f"{where}: fused: expected 0 or 1, got {entry.fused}")


def _checked_dtype(name: str, where: str) -> torch.dtype:
    """Return the dtype of a name; raise ValueError unless kernels take it."""
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: dtype: expected float32, float16 or bfloat16, got {name!r}")
    return dtype


_KINDS: dict[str, tuple[Any, Callable[[Any, int, str], None]]] = {
    "expert_ffn": (Entry, _expect_expert_ffn),
    "conv3x3": (ConvEntry, _expect_convolution),
    "attention": (AttentionEntry, _expect_attention),
    "few_rows": (FewRowsEntry, _expect_few_rows),
}
"""Fields of a table that hold entries, each with their class and what checks one."""
