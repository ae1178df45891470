"""Which implementation the operations run: `auto` picks one, a name asked for runs or raises."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

BACKENDS = ("auto", "reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "ACTVAR_BACKEND"
MOST_SEQUENCES = 65535
"""Programs along the second axis of a CUDA grid, where kernels have the rows R, or tiles of 64 or more tokens."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors whose memory holds what they say."""

_chosen: str | None = None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the operation here."""


def set_backend(name: str) -> None:
    """Choose the backend of every operation in this process, over the environment variable `ACTVAR_BACKEND`.

    It holds for all threads, also those that are at work.

    Raises:
        ValueError: a name that is not one of `BACKENDS`.
    """
    global _chosen
    _chosen = _checked(name, "set_backend")


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """`set_backend` for the duration of the context. It holds for all threads, so only one at a time may be in it."""
    global _chosen
    before, _chosen = _chosen, _checked(name, "using_backend")
    try:
        yield
    finally:
        _chosen = before


def get_backend() -> str:
    """The chosen backend: `set_backend`, else `ACTVAR_BACKEND`, else `"auto"`.

    Raises:
        ValueError: the environment variable holds an unknown name.
    """
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def backend_of(
    operation: str,
    *tensors: torch.Tensor | None,
    supported: tuple[str, ...] = ("reference", "triton"),
    limits: str = "",
    why_not_in_cpp: Callable[[], str | None] | None = None,
    library_on_triton: bool = False,
) -> str:
    """Return the backend that runs `operation` on `tensors`: `"reference"`, `"cpu"` or `"triton"`.

    `auto` takes Triton for CUDA tensors where it is installed, and a C++ kernel for CPU tensors where there is one and
    no gradient is wanted. A backend asked for by name runs or raises; of its gradients the reference takes care. While
    PyTorch records or transforms a call (`needs_torch`), its own operations run.
    Triton asked for by name also runs on CPU tensors when `TRITON_INTERPRET=1` was set before Triton was imported.

    Args:
        tensors: all that the operation reads; the first is one, and says on which device it runs.
        supported: which of the reference and Triton can run this call.
        limits: what Triton takes, for the error.
        why_not_in_cpp: tells why the C++ kernel does not take this call, or None; asked only where it would run.
            Without it there is no such kernel.
        library_on_triton: the Triton backend leaves the operation to PyTorch, as the reference does.

    Raises:
        BackendUnavailableError: the backend was asked for by name and cannot run this call here.
    """
    name, first = get_backend(), tensors[0]
    if library_on_triton and (name == "triton" or first.is_cuda):
        return "reference"
    if needs_torch(*tensors):
        if name in ("auto", "reference"):
            return "reference"
        raise BackendUnavailableError(
            f"{operation}: the {name!r} backend cannot run while PyTorch traces, exports or transforms the call, or on "
            "tensors of a subclass; use the backend 'auto' or 'reference' for that"
        )
    if name == "auto":
        if first.is_cuda:
            return "triton" if "triton" in supported and triton_installed() else "reference"
        takes = first.is_cpu and why_not_in_cpp is not None and not needs_operator(*tensors)
        return "cpu" if takes and why_not_in_cpp() is None else "reference"
    if name == "cpu":
        reason = None
        if not first.is_cpu:
            reason = f"it needs CPU tensors, got {first.device}"
        elif why_not_in_cpp is None:
            reason = "there is no C++ kernel for it"
        elif not torch.compiler.is_compiling():  # otherwise the operator asks when it runs
            reason = why_not_in_cpp()
        if reason is not None:
            raise BackendUnavailableError(f"{operation}: the 'cpu' backend cannot run this call: {reason}")
        return "cpu"
    if name not in supported:
        takes = f" (it takes {limits})" if limits and name == "triton" else ""
        raise BackendUnavailableError(
            f"{operation} has no {name!r} backend here{takes}; available: {', '.join(supported)}. "
            f"Choose one with actvar_kernels.set_backend or {ENVIRONMENT_VARIABLE}, or use 'auto'."
        )
    if name == "triton":
        _expect_triton(operation, first)
    return name


def triton_runs(*tensors: torch.Tensor) -> bool:
    """Return whether operations on `tensors` run on Triton under the chosen backend.

    Raises:
        BackendUnavailableError: Triton was asked for by name and cannot run here.
    """
    name, first = get_backend(), tensors[0]
    if name not in ("auto", "triton") or needs_torch(*tensors):
        return False
    if name == "triton":
        _expect_triton("the model", first)
    return all(tensor.dtype in KERNEL_DTYPES for tensor in tensors) and (
        name == "triton" or (first.is_cuda and triton_installed())
    )


def _expect_triton(operation: str, tensor: torch.Tensor) -> None:
    if not triton_installed():
        raise BackendUnavailableError(f"{operation}: the 'triton' backend needs the triton package (Linux)")
    if not tensor.is_cuda and not interpreted():
        raise BackendUnavailableError(
            f"{operation}: the 'triton' backend needs CUDA tensors, got {tensor.device}; set TRITON_INTERPRET=1 "
            "before Python starts to run the kernels in Triton's interpreter"
        )


def kernel_backends(*tensors: torch.Tensor, fits: bool = True) -> tuple[str, ...]:
    """What `backend_of` takes as supported: the reference alone where a tensor is of none of `KERNEL_DTYPES`, or where
    the call does not fit the kernels otherwise."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return ("reference",)
    return ("reference", "triton") if fits else ("reference",)


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_torch(*tensors: torch.Tensor | None) -> bool:
    """Return whether only PyTorch's own operations may run on `tensors`.

    That is while it traces or exports, under `vmap`, `jvp` and the other transforms of `torch.func`, under forward-mode
    derivatives and function modes, and where a tensor is of a subclass. Kernels would not be seen there, or would read
    memory that such a tensor does not have. `torch.compile` and dispatch modes see the registered operators.
    """
    if torch.compiler.is_compiling():
        return _is_exporting()
    if (
        torch._C._get_tracing_state() is not None
        or is_transforming()
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
    ):
        return True
    return not are_plain(*tensors) and torch._C._len_torch_dispatch_stack() == 0


def is_transforming() -> bool:
    """Return whether a transform of `torch.func`, or a forward-mode derivative, is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def are_plain(*tensors: torch.Tensor | None) -> bool:
    """Return whether all `tensors` have memory of their own that a kernel may read: no subclass, no other layout."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.layout is not torch.strided):
            return False
    return True


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from PyTorch 2.7 on
    return is_exporting is not None and is_exporting()


def _has_function_mode() -> bool:
    """Return whether a mode other than that of the default device replaces PyTorch's functions."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)


def needs_operator(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call must go through its registered operator.

    That is under `torch.compile`, where gradients are wanted, and where a dispatch mode (a FLOP counter, fake tensors)
    wants to see it. Otherwise kernels are launched directly.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return wants_gradient(*tensors)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
