"""Keep the finished parts of long work in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import actvar
from actvar.utils.files import replacing

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Parts:
    """Keep finished parts of long work, a JSON file each; a part that has its file is not computed again.

    A file's name has a hash of all that its contents follow from, so that other settings make other files. An
    unfinished part has a folder of that name, which is removed in the end.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, facts: object, compute: Callable[[Path], T]) -> T:
        """Return the result of `compute(folder)`, from this call or an earlier one.

        Args:
            name: of the part, with which the file's name begins.
            facts: all that the result follows from, JSON-compatible.
            compute: gets the folder of the unfinished part and returns a JSON-compatible result.
        """
        path = self.path(name, facts)
        unfinished = path.with_suffix("")
        if path.exists():
            try:
                found = json.loads(path.read_text("utf-8"))
            except ValueError:
                logger.warning("%s is damaged and is made again", path)
            else:
                shutil.rmtree(unfinished, ignore_errors=True)  # a process killed after it wrote the file leaves it
                return found
        found = compute(unfinished)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in self.folder.glob(f".{glob.escape(path.name)}.*"):
            left_by_a_kill.unlink(missing_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found) + "\n", "utf-8")
        shutil.rmtree(unfinished, ignore_errors=True)
        return found

    def remove(self) -> None:
        """Remove all files of the folder, and the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, name: str, facts: object) -> Path:
        """Return the file of a part, see `get`; a folder that is kept has the same name without a suffix."""
        key = hashlib.sha256(json.dumps([actvar.__version__, facts]).encode()).hexdigest()[:12]
        return self.folder / f"{name}-{key}.json"
