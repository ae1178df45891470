"""Put a mixin in front of a module's own class, by a class made at run time, and take it off again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    _Base = nn.Module  # every class that is made here has a module's class behind it
else:
    _Base = object


class Swapped(_Base):
    """Pickle and copy a module by its original class, since a class that is made at run time cannot be found again."""

    original_class: type
    mixin: type

    def __reduce_ex__(self, protocol):
        """Return how to make the module again: its two classes, and its state."""
        return _bare_instance, (self.original_class, self.mixin), self.__getstate__()


def swap_class(module: Any, mixin: type) -> None:
    """Put `mixin` in front of the class of `module`, in place."""
    module.__class__ = _swapped_class(type(module), mixin)


def restore_class(module: Any) -> None:
    """Undo `swap_class`."""
    module.__class__ = type(module).original_class


def own_class(module: object) -> type:
    """Return the class of `module` without mixins."""
    kind: Any = type(module)
    while issubclass(kind, Swapped):
        kind = kind.original_class
    return kind


@functools.cache
def _swapped_class(original: type, mixin: type) -> type:
    """Return the one class that puts `mixin` in front of `original`."""
    attributes = {"original_class": original, "mixin": mixin, "__module__": original.__module__}
    bases = (mixin, original) if issubclass(original, Swapped) else (Swapped, mixin, original)
    return type(f"ActVAR{original.__name__}", bases, attributes)


def _bare_instance(original: type, mixin: type) -> nn.Module:
    """Return a module of the swapped class without its state, which unpickling adds."""
    cls: Any = _swapped_class(original, mixin)
    return cls.__new__(cls)
