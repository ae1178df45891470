"""Force a choice for a while, whatever a rule or a measured table would choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Choice = TypeVar("Choice")


class Forced(Generic[Choice]):
    """Hold the choice that is forced.

    Attributes:
        value: the choice; None where the rule or the table chooses.
    """

    def __init__(self):
        self.value: Choice | None = None

    @contextmanager
    def using(self, value: Choice) -> Iterator[None]:
        """Force `value` for the duration of the context, then what was forced before; contexts may nest."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
