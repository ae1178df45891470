"""Put another method on one object, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import nn

from actvar.families import family_of
from actvar.models import VAR, Infinity
from actvar.utils.attributes import replaced
from actvar_kernels.checks import as_integer


@contextmanager
def with_methods(module: nn.Module, **methods: Callable) -> Iterator[None]:
    """Replace methods of `module` while the context is open.

    Args:
        methods: by the method's name, a function that gets the module as its first argument.
    """
    with replaced(module, **{name: MethodType(method, module) for name, method in methods.items()}):
        yield


@contextmanager
def with_forwards(blocks: Sequence[nn.Module], make: Callable[[nn.Module], Callable]) -> Iterator[None]:
    """Replace every block's `forward` by `make(block)` while the context is open."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(with_methods(block, forward=make(block)))
        yield


def expect_var(var: nn.Module) -> VAR:
    """Return `var` if it samples by our own loop.

    Raises:
        TypeError: `var` is of another class than `actvar.models.VAR`.
    """
    if not isinstance(var, VAR):
        raise TypeError(f"var: expected actvar.models.VAR (actvar.load_var makes one), got {type(var).__name__}")
    return var


def expect_own_model(model: nn.Module) -> VAR | Infinity:
    """Return `model` if it samples by our own loop.

    Raises:
        TypeError: `model` is of another class than `actvar.models.VAR` and `actvar.models.Infinity`.
    """
    if not isinstance(model, VAR | Infinity):
        raise TypeError(
            "model: expected actvar.models.VAR (actvar.load_var makes one) or actvar.models.Infinity "
            f"(actvar.load_infinity), got {type(model).__name__}"
        )
    return model


def expect_last_scales(name: str, count: int, model: VAR | Infinity) -> int:
    """Return the number of the first of the last `count` scales, before which there must be others.

    Args:
        name: of the argument `count`, for errors.
        count: number of scales.
        model: the model; of an Infinity the scales of its largest images count, and sampling checks those of others.

    Raises:
        TypeError: `count` is no integer.
        ValueError: no scale is left before, or `count` is below 1.
    """
    count = as_integer(name, count)
    scales = len(family_of(model).maps(model))
    if not 1 <= count < scales:
        raise ValueError(f"{name}: expected from 1 to {scales - 1} of the model's scales, got {count}")
    return scales - count
