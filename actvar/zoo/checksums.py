"""SHA-256 of the weights that come with the package, in a table beside the files: a changed file is not used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from actvar.models.checkpoint import CheckpointError
from actvar.utils.files import replacing

TABLE = "sha256.json"


def checked(path: Path) -> Path:
    """Return `path` if the file has the SHA-256 in the table of its folder.

    Raises:
        CheckpointError: the file has another one, or the table does not name it.
        FileNotFoundError: no such file, or no table beside it.
    """
    expected = json.loads((path.parent / TABLE).read_text("utf-8")).get(path.name)
    found = _sha256(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: expected SHA-256 {expected}, as {TABLE} beside it has it, found {found}; the file is damaged or "
            "was changed: install the package again, or rebuild its weights as its MODEL_CARD.md says"
        )
    return path


def save_checksums(folder: Path) -> None:
    """Write the table of every `.safetensors` file in `folder`."""
    table = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    with replacing(folder / TABLE) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
