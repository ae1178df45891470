"""Standard output and error of a command: what happens to them never changes what the command does."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO


class ForgivingStream:
    """A text stream that shows characters which it cannot encode as escapes, and drops what nobody reads any more.

    Another error, such as a full disk, is raised once. Everything else is that of the stream behind it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._is_usable = True

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, and return its length.

        Raises:
            OSError: the text cannot be written, for another reason than that nobody reads it.
        """
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered; errors are those of `write`."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable, *arguments: str) -> None:
        if not self._is_usable:
            return
        try:
            action(*arguments)
        except OSError as error:
            self._is_usable = False
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())  # for what is still buffered when Python ends
            if not isinstance(error, BrokenPipeError):
                raise


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` forgiving while the context is open.

    A stream that is not there, as in a process that was started with `>&-`, becomes one that drops everything.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        streams = [
            opened.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream
            for stream in before
        ]
        sys.stdout, sys.stderr = forgiving = [ForgivingStream(stream) for stream in streams]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in forgiving:
                with contextlib.suppress(OSError):  # which the command had the chance to report
                    stream.flush()
