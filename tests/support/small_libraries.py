"""Write small C++ libraries, and scripts in place of compilers, and find what a build leaves."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from actvar_kernels.cpu_backend.building import Library

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="it compiles a small library")
SOURCE = 'extern "C" int answer() { return %d; }\n'
CURE = "set TORCH_EXTENSIONS_DIR to a folder that you can write to"


def private_folder() -> Path:
    return Path(tempfile.gettempdir(), f"actvar-{os.getuid()}")


def probe(folder: Path, answer: int = 42, flags: tuple[str, ...] = ()) -> Library:
    """Write the sources of a small library."""
    folder.mkdir(parents=True, exist_ok=True)
    source, header = folder / "probe.cpp", folder / "probe.h"
    source.write_text('#include "probe.h"\n')
    header.write_text(SOURCE % answer)
    return Library("probe", "a probe", "a moment", [source], [header], flags, "answer")


def script(path: Path, text: str) -> str:
    """Write an executable shell script and return its path as a word of `CXX`."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"'{path}'"


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so")) if folder.is_dir() else []


def leftovers(folder: Path) -> list[str]:
    """Return what a build leaves beside libraries and locks."""
    return [path.name for path in folder.iterdir() if path.suffix not in (".so", ".lock")] if folder.is_dir() else []


def expect_no_process_of(path: Path) -> None:
    """Wait until no running process has `path` in its command; one that was killed takes a moment to end."""
    deadline = time.monotonic() + 60
    while commands := [command for command in running_commands() if os.fsencode(path) in command]:
        assert time.monotonic() < deadline, commands


def running_commands() -> Iterator[bytes]:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended meanwhile
            yield command.read_bytes()


def compiled_lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiling a probe")]
