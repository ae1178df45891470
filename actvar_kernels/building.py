"""C++ that is compiled when it is first needed, by torch's extension builder."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension


def why_no_compiler() -> str | None:
    """What is missing for a build, or None."""
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"it needs a C++ compiler: {compiler!r} is not there; install g++ or set CXX"
    with ninja_on_path():
        if not cpp_extension.is_ninja_available():
            return "it needs ninja: pip install ninja"
    return None


def built(
    name: str, sources: Sequence[Path], headers: Sequence[Path], compiler_flags: list[str], linker_flags: list[str]
) -> Path:
    """The shared library of C++ `sources`, which include `headers`: from torch's extension cache, or compiled into it.

    Raises:
        RuntimeError, OSError: it does not compile, or the cache cannot be written.
    """
    contents = b"".join(source.read_bytes() for source in (*sources, *headers))
    # with the path, which is in ninja's file: installations that share a folder would build it anew in turn
    digest = hashlib.sha256(contents + f"{torch.__version__} {sources[0]}".encode()).hexdigest()[:12]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / f"{name}_{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), ninja_on_path():
        # torch's own lock, for which it waits for ever, can only be that of a process that was killed
        (folder / "lock").unlink(missing_ok=True)
        path = cpp_extension.load(
            folder.name,
            [str(source) for source in sources],
            extra_cflags=compiler_flags,
            extra_ldflags=linker_flags,
            build_directory=str(folder),
            is_python_module=False,
        )
    return Path(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, also when that is killed."""
    import fcntl  # where there is none (Windows) the build fails, and `cpu_kernel` says why

    with (folder / "actvar.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def ninja_on_path() -> Iterator[None]:
    """Let torch find the `ninja` of the package of that name, also where its environment is not activated."""
    try:
        import ninja
    except ImportError:
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, ninja.BIN_DIR))
    try:
        yield
    finally:
        os.environ["PATH"] = before
