"""Compile C++ when it is first needed, and find it in a cache the next time."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from actvar_kernels.cpu_backend import build_folders
from actvar_kernels.cpu_backend.build_folders import Folder

logger = logging.getLogger(__name__)

SECONDS = 600
"""Time that a build may take, also together with waiting for the build of another process."""
_REMEDY = "install g++ or set CXX to a C++ compiler"


class BuildError(RuntimeError):
    """Say in one line why a C++ library can be neither found nor built, and what to do."""


class Library(NamedTuple):
    """Describe a shared library.

    Attributes:
        name: beginning of its file's name.
        title: name for messages.
        duration: time that a build takes, for messages.
        sources: C++ files.
        headers: files that the sources include.
        flags: arguments of the compiler, also when it links.
        symbol: a function that the library has.
    """

    name: str
    title: str
    duration: str
    sources: Sequence[Path]
    headers: Sequence[Path]
    flags: Sequence[str]
    symbol: str


def why_no_compiler() -> str | None:
    """Return what is wrong with the compiler that the environment names, or None."""
    return why_not(_compiler)


def why_not(attempt: Callable[[], object]) -> str | None:
    """Return None if an attempt succeeds, otherwise why not.

    Args:
        attempt: raises BuildError where it fails.
    """
    try:
        attempt()
    except BuildError as error:
        return str(error)
    return None


def is_on(library: Library, reason: str | None, instead: str) -> bool:
    """Return whether a library can be loaded; log why not.

    Args:
        library: which one.
        reason: why it cannot be loaded, or None.
        instead: what runs in its place, for the message.
    """
    if reason is not None:
        logger.warning("%s are off, so %s: %s", library.title, instead, reason)
    return reason is None


def load(library: Library) -> ctypes.CDLL:
    """Load a library from the cache, or compile it into the cache first.

    A library that was compiled from the same sources is loaded wherever the package lies, and without a compiler. Where
    the cache cannot be used, a folder of this user among the temporary files takes its place.

    Raises:
        BuildError: there is no such library, and it cannot be compiled or kept.
    """
    if os.name != "posix":
        raise BuildError(f"{library.title} are compiled on Linux and macOS only")
    try:
        stem = f"{library.name}_{_digest(library)}"
    except OSError as error:
        raise BuildError(f"its sources cannot be read: {error}; install the package anew") from error
    folders = build_folders.folders()
    for folder in folders:
        loaded = _found(library, folder, stem)
        if loaded is not None:
            return loaded
    compiler, deadline, refused = _compiler(), time.monotonic() + SECONDS, []
    for folder in folders:
        try:
            folder.prepare()
            with build_folders.lock(folder.path / f"{stem}.lock", deadline, library.title) as alone:
                loaded = _found(library, folder, stem)
                if loaded is None:
                    place = f"{shown(folder.path)}, since {_without(refused)}" if refused else shown(folder.path)
                    logger.warning("compiling %s once (%s) into %s", library.title, library.duration, place)
                    if alone:
                        _remove_leftovers(folder.path, stem)
                    loaded = _built(library, folder.path, stem, compiler, deadline)
                return loaded
        except TimeoutError as error:
            raise BuildError(f"{error} in {SECONDS} s; end that process and try again") from error
        except OSError as error:
            refused.append(f"{shown(folder.path)} cannot be used ({error.strerror or error})")
    raise BuildError(f"there is no folder for the compiled library: {_without(refused)}")


def shown(path: str | Path) -> str:
    """Return a path as text that every stream can write, also where its name is not in the file system's encoding."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _without(refused: list[str]) -> str:
    """Say why folders cannot be used, and what to do."""
    return "; ".join([*refused, "set TORCH_EXTENSIONS_DIR to a folder that you can write to"])


def _digest(library: Library) -> str:
    """Return a number of all that decides what is in the library, wherever its sources lie."""
    digest = hashlib.sha256(repr((torch.__version__, sysconfig.get_platform(), *library.flags)).encode())
    for path in (*library.sources, *library.headers):
        contents = path.read_bytes()
        digest.update(b"%d " % len(contents) + contents)
    return digest.hexdigest()[:12]


def _file_name(stem: str, file: Path) -> str:
    """Return the name of a library with the contents of `file`: a file that was cut off can crash the process."""
    return f"{stem}_{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


def _found(library: Library, folder: Folder, stem: str) -> ctypes.CDLL | None:
    """Return the library if `folder` has a file of it that is complete, trusted, and runs on this system."""
    try:
        files = sorted(folder.path.iterdir()) if folder.is_trusted() else []
    except OSError:
        return None
    for file in files:
        with contextlib.suppress(OSError, BuildError):
            if not file.name.startswith(f"{stem}_") or not build_folders.is_trusted_file(file):
                continue
            if file.name == _file_name(stem, file):
                return _opened(library, file)
    return None


def _opened(library: Library, file: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(file))
        getattr(loaded, library.symbol)
    except (OSError, AttributeError) as error:
        raise BuildError(f"the compiled library cannot be loaded: {error}; {_REMEDY}") from error
    return loaded


def _compiler() -> list[str]:
    """Return the command of the compiler: `CXX` or `c++`.

    Raises:
        BuildError: it is not there.
    """
    named = os.environ.get("CXX", "")
    try:
        command = shlex.split(named) or ["c++"]
    except ValueError as error:
        raise BuildError(f"CXX: expected a command, got {named!r} ({error}); {_REMEDY}") from error
    path = shutil.which(command[0])
    if path is None:
        raise BuildError(f"it needs a C++ compiler: {command[0]!r} is not there; {_REMEDY}")
    return [os.path.abspath(path), *command[1:]]


def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what builds left that were killed."""
    for path in folder.glob(f".{stem}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _built(library: Library, folder: Path, stem: str, compiler: list[str], deadline: float) -> ctypes.CDLL:
    """Compile the library into `folder`, under a temporary name until it is complete.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{stem}.", dir=folder, ignore_cleanup_errors=True) as temporary:
        objects = [Path(temporary, f"{number}.o") for number in range(len(library.sources))]
        out = Path(temporary, "library.so")
        compiling = [
            _Step([*compiler, "-fPIC", *library.flags, "-c", str(source), "-o", str(file)], file)
            for source, file in zip(library.sources, objects, strict=True)
        ]
        _run(compiling, deadline)
        _run([_Step([*compiler, "-shared", *map(str, objects), *library.flags, "-o", str(out)], out)], deadline)
        out.chmod(out.stat().st_mode & 0o755)
        file = folder / _file_name(stem, out)
        out.replace(file)
    return _opened(library, file)


class _Step(NamedTuple):
    """Name a command of the build and the file that it makes."""

    command: list[str]
    out: Path

    @property
    def log(self) -> Path:
        """Return the file that the command writes its messages to."""
        return self.out.with_suffix(".log")


def _run(steps: Sequence[_Step], deadline: float) -> None:
    """Run steps, as many at a time as there are processors; at an error or an interruption end those that run.

    Raises:
        BuildError: one fails, makes no file, or does not end before the deadline.
    """
    waiting, running = list(steps), []
    at_once = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                step = waiting.pop(0)
                running.append((step, _started(step)))
            for step, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((step, process))
                if process.returncode or not step.out.is_file():
                    raise BuildError(_failure(step, process.returncode))
            if running and time.monotonic() > deadline:
                raise BuildError(f"{shown(running[0][0].command[0])} did not end in {SECONDS} s; {_REMEDY}")
            time.sleep(0.02)
    finally:
        for _, process in running:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # the compiler's own processes too
            process.wait()


def _started(step: _Step) -> subprocess.Popen:
    environment = os.environ | {"TMPDIR": str(step.out.parent), "LC_ALL": "C"}
    # The log is no pipe, which a process that the compiler leaves behind would keep open.
    with step.log.open("wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        try:
            return subprocess.Popen(step.command, env=environment, start_new_session=True, **streams)
        except OSError as error:
            raise BuildError(f"{shown(step.command[0])} does not start: {error.strerror}; {_REMEDY}") from error


def _failure(step: _Step, code: int) -> str:
    """Say in one line how a step failed, with what the compiler says about it."""
    lines = step.log.read_text("utf-8", "replace").split("\n")
    said = next((line for line in lines if "error" in line), "".join(lines[:1])).strip()[:300]
    ended = f"failed with exit code {code}" if code else "made no file"
    return f"{shown(step.command[0])} {ended}{': ' if said else ''}{said}; {_REMEDY}"
