"""Read measured choices for the expert FFN on one GPU.

`actvar_kernels.tools.tune` writes the table as JSON, and `ACTVAR_TUNED` names it. A call takes the entry of its type,
channels and expert width whose number of tokens is nearest, by at most a factor of two. Other calls take what
`tiles.py` says.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from actvar_kernels.cpu_backend import table_file
from actvar_kernels.cpu_backend.table_file import ENVIRONMENT_VARIABLE, GPU, of_fields
from actvar_kernels.triton_backend import tiles

SCHEDULES = ("dense", "tile_list")
FACTOR = 2.0


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


class Table(NamedTuple):
    """Hold what was measured on a GPU.

    Attributes:
        device: name of the GPU.
        capability: the one of `tiles.ARCHITECTURES` that it counts as.
        triton: version of Triton.
        expert_ffn: the entries.
    """

    device: str
    capability: int
    triton: str
    expert_ffn: tuple[Entry, ...]


def write_table(table: Table, path: Path) -> None:
    """Write the table; the file is complete or not there.

    Raises:
        OSError: it cannot be written.
    """
    table_file.write(GPU, table._asdict() | {"expert_ffn": [entry._asdict() for entry in table.expert_ffn]}, path)


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
    shapes = [entry[:4] for entry in entries]
    if len(set(shapes)) != len(shapes):
        raise ValueError(f"{path}: expected one entry for a dtype, tokens, channels and width, got several")
    return table._replace(expert_ffn=entries)


def _checked_entry(entry: Entry, capability: int, path: Path, position: int) -> Entry:
    """Return an entry; raise ValueError unless it names what is shipped."""
    where = f"{path}: expert_ffn[{position}]"
    dtype = getattr(torch, entry.dtype, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: dtype: expected float32, float16 or bfloat16, got {entry.dtype!r}")
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


def tuned_expert_ffn(u: torch.Tensor, width: int) -> Entry | None:
    """Return the entry for a call in the table that `ACTVAR_TUNED` names; None without a table or a near entry.

    Args:
        u: rows `[T, C]`, float32, float16 or bfloat16.
        width: hidden units of an expert.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another GPU.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return None
    name = torch.cuda.get_device_name(u.device) if torch.cuda.is_available() else None
    return _nearest(path, name, tiles.architecture(u), str(u.dtype).removeprefix("torch."), *u.shape, width)


@functools.cache
def _nearest(
    path: str, device: str | None, capability: int, dtype: str, tokens: int, channels: int, width: int
) -> Entry | None:
    table = read_table(Path(path))
    if table is None:
        return None
    if table.capability != capability or device not in (None, table.device):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: {path} was measured on {table.device}, sm_{table.capability}; this is {device}, "
            f"sm_{capability}: run python -m actvar_kernels.tools.tune here, or unset the variable"
        )

    def distance(entry: Entry) -> float:
        return abs(math.log(entry.tokens / tokens))

    same = (e for e in table.expert_ffn if (e.dtype, e.channels, e.width) == (dtype, channels, width))
    near = [entry for entry in same if distance(entry) <= math.log(FACTOR)]
    return min(near, key=distance, default=None)
