"""Find folders for compiled libraries, check whether they can be used, and lock files in them."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

ROOM = 16 * 2**20
"""Bytes that a folder must have room for before a compiler writes to it; a build takes less than half of them."""


class Folder(NamedTuple):
    """Describe a folder for compiled libraries, which does not need to exist.

    Attributes:
        path: absolute path.
        is_private: whether it must be open to its owner only, since it lies where everybody may write.
    """

    path: Path
    is_private: bool

    def is_trusted(self) -> bool:
        """Return whether nobody but this user and the administrator can have put the folder there.

        Raises:
            OSError: the folder is not there.
        """
        if not self.is_private:
            return _put_by_us(self.path)
        found = self.path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077

    def prepare(self) -> None:
        """Make the folder where it is missing, and check that libraries can be written to it and loaded from it.

        Raises:
            OSError: they cannot.
        """
        self.path.mkdir(0o700 if self.is_private else 0o755, parents=True, exist_ok=True)
        if not self.is_trusted():
            raise PermissionError("another user made it or can write to it")
        if os.statvfs(self.path).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise PermissionError("it is mounted with noexec")
        with tempfile.TemporaryFile(dir=self.path) as file:  # the disk may be full
            file.write(bytes(ROOM))


def folders() -> list[Folder]:
    """Return the folders that may hold compiled libraries, the preferred one first."""
    found = []
    with contextlib.suppress(FileNotFoundError):  # a relative path, where the working folder was removed
        found += [Folder(path, False) for path in _cache()]
    with contextlib.suppress(FileNotFoundError):  # there is no temporary folder
        found.append(Folder(Path(os.path.abspath(tempfile.gettempdir()), f"actvar-{os.getuid()}"), True))
    return found


def _cache() -> list[Path]:
    """Return the folder in the cache of torch's extensions, if the environment names one."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return [Path(os.path.abspath(root), "actvar")]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    # A user without a home folder has no cache: "~" stays as it is.
    return [Path(cache, "torch_extensions", "actvar")] if os.path.isabs(cache) else []


def is_trusted_file(path: Path) -> bool:
    """Return whether `path` is a file that nobody else can have put or changed in its trusted folder.

    Raises:
        OSError: the file is not there.
    """
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) and not mode & stat.S_IWOTH and _put_by_us(path)


def _put_by_us(path: Path) -> bool:
    """Return whether `path` belongs to this user or the administrator, or lies where not everybody may write."""
    return path.stat().st_uid in (os.getuid(), 0) or not path.parent.stat().st_mode & stat.S_IWOTH


@contextmanager
def lock(path: Path, deadline: float, title: str) -> Iterator[bool]:
    """Keep other processes out of the context.

    The system frees the lock of a process that was killed. Some file systems have no locks: there the context runs
    without.

    Args:
        path: file of the lock, which stays.
        deadline: moment of `time.monotonic` until which other processes are waited for.
        title: name of the library, for messages.

    Raises:
        TimeoutError: another process holds the lock.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield False
        return
    try:
        yield _locked(descriptor, deadline, title)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for copies in processes that were forked meanwhile
        os.close(descriptor)


def _locked(descriptor: int, deadline: float, title: str) -> bool:
    import fcntl

    says_so = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has not finished compiling {title}") from None
        except OSError:
            return False
        if not says_so:
            logger.warning("waiting for another process that compiles %s", title)
            says_so = True
        time.sleep(0.1)
