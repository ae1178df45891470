"""Put another method on one object, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import nn

from actvar.families import family_of
from actvar.models import VAR
from actvar_kernels.checks import as_integer


@contextmanager
def with_methods(module: nn.Module, **methods: Callable) -> Iterator[None]:
    """`module.<name>` is the given function, with the module as its first argument, while the context is open."""
    before = {name: module.__dict__[name] for name in methods if name in module.__dict__}
    module.__dict__.update({name: MethodType(method, module) for name, method in methods.items()})
    try:
        yield
    finally:
        for name in methods:
            del module.__dict__[name]
        module.__dict__.update(before)


@contextmanager
def with_forwards(blocks: Sequence[nn.Module], make: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Every block's `forward` is `make(block)` while the context is open."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(with_methods(block, forward=make(block)))
        yield


def expect_var(var: nn.Module) -> VAR:
    """`var`, if its sampling loop is ours.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(var, VAR):
        raise TypeError(f"var: expected actvar.models.VAR (actvar.load_var makes one), got {type(var).__name__}")
    return var


def expect_last_scales(name: str, count: int, var: VAR) -> int:
    """Number of the first of the last `count` scales, before which there must be others.

    Raises:
        TypeError: `count` is no integer.
        ValueError: there are none, or `count` is below 1.
    """
    count = as_integer(name, count)
    scales = len(family_of(var).maps(var))
    if not 1 <= count < scales:
        raise ValueError(f"{name}: expected from 1 to {scales - 1} of the model's scales, got {count}")
    return scales - count
