"""Classes made at run time that put a mixin in front of a module's own class, and the way back."""

from __future__ import annotations

import functools

from torch import nn


class Mixed:
    """Pickles and copies by the original class, since mixed classes are made at run time."""

    def __reduce_ex__(self, protocol):
        return _bare_instance, (self.original_class, self.mixin), self.__getstate__()


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the class of `module`, in place."""
    module.__class__ = _mixed_class(type(module), mixin)


def unmix(module: nn.Module) -> None:
    """Undo `mix_in`."""
    module.__class__ = type(module).original_class


def own_class(module: nn.Module) -> type:
    """Return the class of `module` without mixins."""
    kind = type(module)
    while issubclass(kind, Mixed):
        kind = kind.original_class
    return kind


@functools.cache
def _mixed_class(original: type, mixin: type) -> type:
    """The one class that puts `mixin` in front of `original`."""
    attributes = {"original_class": original, "mixin": mixin, "__module__": original.__module__}
    return type(f"ActVAR{original.__name__}", (Mixed, mixin, original), attributes)


def _bare_instance(original: type, mixin: type) -> nn.Module:
    cls = _mixed_class(original, mixin)
    return cls.__new__(cls)
