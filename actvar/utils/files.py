"""Write files that are either complete or not there, and read values from files that may change afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and rename the file to `path` when the context ends.

    Missing folders above `path` are made. After an error the old file is as it was, and the temporary one is gone.

    Raises:
        OSError: the file cannot be written; an error of safetensors becomes one too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_mapped(tensor: torch.Tensor, device: str | torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy of a tensor in memory of its own.

    A tensor that is mapped from a file changes with the file. If the file is cut short, as by `torch.save` over it, a
    bus error ends the process.

    Args:
        tensor: a tensor of any shape and dtype, mapped or not.
        device: device of the copy.
        dtype: dtype of the copy.
    """
    return torch.empty(tensor.shape, device=device, dtype=dtype).copy_(tensor)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
