"""Read and write the file of measured choices that `ACTVAR_TUNED` names.

A file holds one table. Its field `"kind"` tells which: `"gpu"` for tiles, by `actvar_kernels.tools.tune`, or `"cpu"`
for operations, by `actvar bench`. A file without that field is of a GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

ENVIRONMENT_VARIABLE = "ACTVAR_TUNED"
CPU, GPU = "cpu", "gpu"

Fields = TypeVar("Fields", bound=tuple)


def read(path: Path) -> tuple[str, Any]:
    """Return the kind of a table and the rest of its content, which is not checked yet.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or of an unknown kind.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        writers = "actvar_kernels.tools.tune or actvar bench --out"
        raise ValueError(f"{path}: expected JSON as {writers} writes it: {error}") from error
    kind = content.pop("kind", GPU) if isinstance(content, dict) else GPU
    if kind not in (CPU, GPU):
        raise ValueError(
            f"{path}: kind: expected 'cpu', as actvar bench --out writes it, or 'gpu', as actvar_kernels.tools.tune "
            f"does, got {kind!r}; write the table anew by one of them"
        )
    return kind, content


def write(kind: str, content: dict[str, Any], path: Path) -> None:
    """Write a table; the file is complete or not there.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"kind": kind} | content, indent=1) + "\n", "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def of_fields(kind: type[Fields], content: object, where: str) -> Fields:
    """Return a named tuple of a JSON object that has exactly its fields, each of its type.

    Args:
        kind: a class of named tuples, whose fields are texts, numbers or tuples.
        content: what was read.
        where: begins the messages of errors.

    Raises:
        ValueError: a field is missing, is not known, or has another type.
    """
    names: tuple[str, ...] = kind._fields  # pyright: ignore[reportAttributeAccessIssue] named tuples have them
    if not isinstance(content, dict) or set(content) != set(names):
        found = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where} expected an object with {', '.join(names)}, got {found}")
    json_types = {str: (str,), int: (int,), float: (int, float)}
    for name, annotation in get_type_hints(kind).items():
        if type(content[name]) not in json_types.get(annotation, (list,)):
            raise ValueError(f"{where} {name}: got {content[name]!r}")
    return kind(**content)
