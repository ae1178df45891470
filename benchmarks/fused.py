"""Find out which operations run fused: the C++ functions and Triton kernels of ours that a call runs, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from actvar_kernels.backend import triton_installed
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.token_draw import cpu_kernel as cpu_sampling

QUERIES = ("best_isa", "checksums", "isa_layout", "isa_name")
"""Functions of the C++ library that compute nothing."""


def fused_operations(run: Callable[[], object]) -> dict[str, int]:
    """Return how often `run()` calls each C++ function and launches each Triton kernel of ours, by name.

    `run` is called twice: the first call builds and loads what the second, which is counted, runs. Kernels count on a
    GPU, on a virtual one and in the interpreter; a CUDA graph that is replayed launches none of them again.
    """
    run()
    counts: Counter[str] = Counter()
    with ExitStack() as watched:
        for function in _cpp_functions():
            watched.enter_context(_counted_calls(function, counts))
        if triton_installed():
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kernel_class in (JITFunction, InterpretedFunction):
                watched.enter_context(_counted_launches(kernel_class, counts))
        run()
    return dict(sorted(counts.items()))


def text(fused: dict[str, dict[str, int]]) -> str:
    """Return a table to read, a line for each way of sampling."""
    lines = ["fused operations, and how often one sample calls them"]
    for way, counts in fused.items():
        lines.append(f"{way:17s}" + (", ".join(f"{name} {count}" for name, count in counts.items()) or "none"))
    return "\n".join(lines) + "\n"


def _cpp_functions() -> list:
    """Return the functions of the C++ libraries that have been called before, except `QUERIES`."""
    if cpu.why_unavailable() is not None:
        return []
    found = []
    for library in (cpu.library(), cpu_sampling.library()):
        functions = [value for value in vars(library).values() if isinstance(value, library._FuncPtr)]
        found += [function for function in functions if function.__name__ not in QUERIES]
    return found


@contextmanager
def _counted_calls(function, counts: Counter[str]) -> Iterator[None]:
    """Count the calls of a ctypes function by its `errcheck`, so that the function object and its types stay."""
    before = function.errcheck

    def count(result, called, arguments):
        counts[function.__name__] += 1
        return result if before is None else before(result, called, arguments)

    function.errcheck = count
    try:
        yield
    finally:
        if before is None:
            del function.errcheck
        else:
            function.errcheck = before


@contextmanager
def _counted_launches(kernel_class: type, counts: Counter[str]) -> Iterator[None]:
    """Count the launches of our kernels, which are objects of a class of Triton's."""
    launch = kernel_class.run

    def count(kernel, *arguments, warmup: bool, **options):
        if not warmup and kernel.fn.__module__.startswith("actvar_kernels."):
            counts[kernel.fn.__name__] += 1
        return launch(kernel, *arguments, warmup=warmup, **options)

    with mock.patch.object(kernel_class, "run", count):
        yield
