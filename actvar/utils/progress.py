"""Show progress bars in a terminal only, and none at all within `quiet`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_is_quiet = ContextVar("is_quiet", default=False)


def progress(steps: Iterable[Any] | None = None, hidden: bool = False, **options: Any) -> tqdm[Any]:
    """Return tqdm's bar over `steps`, which is shown where standard error is a terminal.

    Args:
        steps: what to iterate over; None for a bar that is moved by `update`.
        hidden: whether to show no bar in any case, as in all processes but one.
        options: further arguments of tqdm.
    """
    return tqdm(steps, disable=True if hidden or _is_quiet.get() else None, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no bars while the context is open."""
    before = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(before)
