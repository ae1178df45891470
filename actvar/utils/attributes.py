"""Replace attributes of an object for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Give `target` these attributes while the context is open, then those that it had; contexts may nest.

    Args:
        target: an object with a `__dict__`, such as a module; a function that replaces a method gets no `self`.
        attributes: values by name.
    """
    own = vars(target)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del own[name]
        own.update(before)
