"""Classes made at run time that put a mixin in front of a module's own class, and the way back."""

from __future__ import annotations

import functools

from torch import nn


class Swapped:
    """Pickles and copies by the original class, since such classes are made at run time."""

    def __reduce_ex__(self, protocol):
        return _bare_instance, (self.original_class, self.mixin), self.__getstate__()


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the class of `module`, in place."""
    module.__class__ = _swapped_class(type(module), mixin)


def restore_class(module: nn.Module) -> None:
    """Undo `swap_class`."""
    module.__class__ = type(module).original_class


def own_class(module: nn.Module) -> type:
    """Return the class of `module` without mixins."""
    kind = type(module)
    while issubclass(kind, Swapped):
        kind = kind.original_class
    return kind


@functools.cache
def _swapped_class(original: type, mixin: type) -> type:
    """The one class that puts `mixin` in front of `original`."""
    attributes = {"original_class": original, "mixin": mixin, "__module__": original.__module__}
    bases = (mixin, original) if issubclass(original, Swapped) else (Swapped, mixin, original)
    return type(f"ActVAR{original.__name__}", bases, attributes)


def _bare_instance(original: type, mixin: type) -> nn.Module:
    cls = _swapped_class(original, mixin)
    return cls.__new__(cls)
