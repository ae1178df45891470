"""Which implementation the operations run: `auto` picks one, a name asked for runs or raises."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

BACKENDS = ("auto", "reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "ACTVAR_BACKEND"

_chosen: str | None = None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the operation here."""


def set_backend(name: str) -> None:
    """Choose the backend of every operation in this process, over the environment variable `ACTVAR_BACKEND`.

    Raises:
        ValueError: a name that is not one of `BACKENDS`.
    """
    global _chosen
    _chosen = _checked(name, "set_backend")


def get_backend() -> str:
    """The chosen backend: `set_backend`, else `ACTVAR_BACKEND`, else `"auto"`.

    Raises:
        ValueError: the environment variable holds an unknown name.
    """
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def implementation(operation: str, available: Mapping[str, Callable]) -> Callable:
    """The function to run for `operation`.

    Args:
        available: implementations by backend name, the one `auto` prefers first.

    Raises:
        BackendUnavailableError: the backend was asked for by name and `operation` has no such implementation.
    """
    name = get_backend()
    if name == "auto":
        return next(iter(available.values()))
    if name not in available:
        raise BackendUnavailableError(
            f"{operation} has no {name!r} backend here; available: {', '.join(available)}. "
            f"Choose one with actvar_kernels.set_backend or {ENVIRONMENT_VARIABLE}, or use 'auto'."
        )
    return available[name]


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
