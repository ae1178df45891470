"""Say which operations a measured table takes away from the C++ kernels, on the processor that it was measured on.

`actvar bench --out` writes the table, and `ACTVAR_TUNED` names it. It is read once, when a kernel
could run for the first time. Without such a table the rule of `actvar_kernels.backend.choose` holds.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from actvar_kernels.cpu_backend import cpu, table_file
from actvar_kernels.cpu_backend.table_file import CPU, ENVIRONMENT_VARIABLE, of_fields

OPERATIONS = (
    "select_tokens",
    "normalize_modulate",
    "subset_attention",
    "add_normalize",
    "add_normalize_route",
    "route_experts",
    "expert_ffn",
    "expert_ffn_scatter",
    "scatter_rows",
    "sample_tokens",
    "group_norm_silu",
)
"""Operations of `actvar_kernels.operations.table` that have a C++ kernel."""
RUNS = ("cpu", "reference")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in cpu.DTYPES}


class Choice(NamedTuple):
    """Say what was faster for an operation.

    Attributes:
        operation: one of `OPERATIONS`.
        dtype: a name of `DTYPES`, that of the first tensor of a call.
        limit: how many numbers the first tensor has at least to be large.
        below: what runs calls under the limit, one of `RUNS`.
        above: what runs the other calls, one of `RUNS`.
    """

    operation: str
    dtype: str
    limit: int
    below: str
    above: str

    def runs(self, first: torch.Tensor) -> str:
        """Return what runs a call whose first tensor is `first`, of any shape."""
        return self.above if first.numel() >= self.limit else self.below


class Table(NamedTuple):
    """Hold what was measured on a processor.

    Attributes:
        processor, isa: names of the processor and of the instructions that the kernels used.
        threads: threads of PyTorch.
        choices: one for an operation and dtype at most.
    """

    processor: str
    isa: str
    threads: int
    choices: tuple[Choice, ...]


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


def instructions() -> str:
    """Return the name of the instructions that kernels and PyTorch's products use, or say that there are no kernels."""
    if cpu.why_unavailable():
        return "no kernels"
    return cpu.isa_name(cpu.best_isa()) + (" and AMX" if cpu.has_tiles() else "")


def write_table(table: Table, path: Path) -> None:
    """Write the table; the file is complete or not there.

    Raises:
        OSError: it cannot be written.
    """
    choices = [choice._asdict() for choice in table.choices]
    table_file.write(CPU, table._asdict() | {"choices": choices}, path)


def read_table(path: Path) -> Table | None:
    """Read and check a table; None where the file holds that of a GPU.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table, or names what there is not.
    """
    kind, content = table_file.read(path)
    if kind != CPU:
        return None
    table = of_fields(Table, content, f"{path}:")
    choices = tuple(_checked(entry, f"{path}: choices[{position}]:") for position, entry in enumerate(table.choices))
    if len({choice[:2] for choice in choices}) != len(choices):
        raise ValueError(f"{path}: expected one choice for an operation and dtype, got several")
    return table._replace(choices=choices)


def _checked(content: object, where: str) -> Choice:
    """Return a choice; raise ValueError unless it names what there is."""
    choice = of_fields(Choice, content, where)
    for name, known in dict(operation=OPERATIONS, dtype=DTYPES, below=RUNS, above=RUNS).items():
        if getattr(choice, name) not in known:
            raise ValueError(f"{where} {name}: expected one of {', '.join(known)}, got {getattr(choice, name)!r}")
    if choice.limit < 0:
        raise ValueError(f"{where} limit: expected 0 or more, got {choice.limit}")
    return choice


def table_in_force() -> Table | None:
    """Return the table that `ACTVAR_TUNED` names; None where it names none, or one of a GPU.

    Raises:
        OSError: see `read_table`.
        ValueError: see `read_table`; or the table is that of another processor.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    table = read_table(Path(path)) if path else None
    if table is not None and table[:2] != (here := (processor(), instructions())):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: {path} was measured on {', '.join(table[:2])}; this is {', '.join(here)}: run "
            "actvar bench --out here, or unset the variable"
        )
    return table


@functools.cache
def in_force() -> dict[tuple[str, torch.dtype], Choice]:
    """Return the choices of the table in force by operation and dtype, none without a table; they are read once.

    Raises:
        OSError, ValueError: see `table_in_force`.
    """
    table = table_in_force()
    return {} if table is None else {(found.operation, DTYPES[found.dtype]): found for found in table.choices}


def what_runs(operation: str, first: torch.Tensor) -> str:
    """Return what runs a call that C++ takes, one of `RUNS`.

    Args:
        operation: its name.
        first: the first tensor of the call, of any shape.

    Raises:
        OSError, ValueError: see `table_in_force`.
    """
    choice = in_force().get((operation, first.dtype))
    return "cpu" if choice is None else choice.runs(first)


def description() -> str:
    """Return one line about what the table in force chose, or about the rule.

    Raises:
        OSError, ValueError: see `table_in_force`.
    """
    table = table_in_force()
    if table is None:
        return f"C++ wherever it takes a call ({ENVIRONMENT_VARIABLE} names no table of a CPU)"
    left = [choice for choice in table.choices if "reference" in (choice.below, choice.above)]
    found = ", ".join(f"{choice.operation} {choice.dtype}{_where(choice)}" for choice in left) or "nothing"
    return f"PyTorch for {found}; C++ for the rest, by {os.environ[ENVIRONMENT_VARIABLE]}"


def _where(choice: Choice) -> str:
    """Return for which calls a choice takes the reference, with a space before it; "" for all."""
    if choice.limit == 0 or choice.below == choice.above:
        return ""
    return f" below {choice.limit} numbers" if choice.below == "reference" else f" from {choice.limit} numbers on"
