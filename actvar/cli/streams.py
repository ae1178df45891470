"""Keep a command working, whatever becomes of its standard output and error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class ForgivingStream:
    """Write text to a stream, with escapes for characters that it cannot encode, and drop text that nobody reads.

    Another error, such as a full disk, is raised once. All other attributes are those of the stream behind it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_usable = True

    def __getattr__(self, name: str):
        """Return an attribute of the stream behind this one."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, and return its length.

        Raises:
            OSError: the text cannot be written, although somebody reads it.
        """
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Write the buffered text; errors are those of `write`."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable, *arguments: str) -> None:
        """Call `action`; after an error, drop everything from now on."""
        if not self._is_usable:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._is_usable = False
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())  # takes text that is still buffered at the end
            if not isinstance(error, BrokenPipeError):
                raise


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` forgiving while the context is open.

    A missing stream, as in a process that was started with `>&-`, becomes one that drops everything.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        streams = [
            opened.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream
            for stream in before
        ]
        forgiving: list[Any] = [ForgivingStream(stream) for stream in streams]
        sys.stdout, sys.stderr = forgiving
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in forgiving:
                with contextlib.suppress(OSError):  # the command had the chance to report it
                    stream.flush()
