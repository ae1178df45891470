"""Keep the features of prompts in files, so that a prompt is encoded once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actvar.utils.files import read_mapped, replacing

MOST_BYTES = 2**30
"""Bytes that the files of a cache have together; a prompt of 64 tokens has 0.5 MiB in float32."""
_NAME = "features"

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the folder of the user's cache: `actvar/prompts` in `XDG_CACHE_HOME`, or in `~/.cache` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actvar" / "prompts"


class FeatureCache:
    """Keep features by key, each as `<key>.safetensors`, and drop those that were not used for longest.

    A file is complete or not there. Several processes may share a folder.

    Args:
        folder: the folder of the files, made when the first is written.
        most_bytes: bytes of all files together, which may be exceeded by one file while it is written.
    """

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int = MOST_BYTES):
        self.folder, self.most_bytes = Path(folder), most_bytes

    def read(self, key: str) -> torch.Tensor | None:
        """Return the features `[tokens, channels]` of a key, or None if there are none that can be read."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                mapped = file.get_tensor(_NAME)
                features = read_mapped(mapped, "cpu", mapped.dtype)
            os.utime(path)  # the least recently used files go first
        except (OSError, SafetensorError):
            return None
        is_usable = features.ndim == 2 and features.is_floating_point() and bool(features.isfinite().all())
        return features if is_usable else None

    def write(self, key: str, features: torch.Tensor) -> None:
        """Write the features of a key, and drop files beyond the limit; log a warning where that is not possible."""
        try:
            with replacing(self._path(key)) as temporary:
                save_file({_NAME: features.contiguous()}, temporary)
            self._trim()
        except OSError as error:
            logger.warning("the features of a prompt are not kept for the next time: %s", error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _trim(self) -> None:
        """Remove the files that were not used for longest, until the rest is within the limit."""
        files = []
        for path in self.folder.glob("*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
