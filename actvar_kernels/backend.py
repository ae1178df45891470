"""Which implementation the operations run: `auto` picks one, a name asked for runs or raises."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "ACTVAR_BACKEND"
MOST_SEQUENCES = 65535
"""Programs along the second axis of a CUDA grid, where kernels have the rows R, or tiles of 64 or more tokens."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

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
    tensor: torch.Tensor,
    supported: tuple[str, ...] = ("reference", "triton"),
    limits: str = "",
    in_cpp: Callable[[], bool] | None = None,
) -> str:
    """The backend that runs `operation` on `tensor`: `"reference"`, `"cpu"` or `"triton"`.

    `auto` takes Triton for CUDA tensors where it is installed, and a C++ kernel for CPU tensors where there is one.
    Triton asked for by name also runs on CPU tensors when `TRITON_INTERPRET=1` was set before Triton was imported. In
    the backend `"cpu"` the operations without a C++ kernel run PyTorch's, like the reference.

    Args:
        supported: which of the reference and Triton can run this call.
        limits: what Triton takes, for the error.
        in_cpp: whether the C++ kernel takes this call; asked only where it would run. None: there is no such kernel.

    Raises:
        BackendUnavailableError: the backend was asked for by name and cannot run this call here.
    """
    name = get_backend()
    if name == "auto":
        if tensor.is_cuda:
            return "triton" if "triton" in supported and triton_installed() else "reference"
        return "cpu" if in_cpp is not None and tensor.is_cpu and in_cpp() else "reference"
    if name == "cpu":
        if not tensor.is_cpu:
            raise BackendUnavailableError(f"{operation}: the 'cpu' backend needs CPU tensors, got {tensor.device}")
        return "cpu" if in_cpp is not None and in_cpp() else "reference"
    if name not in supported:
        takes = f" (it takes {limits})" if limits and name == "triton" else ""
        raise BackendUnavailableError(
            f"{operation} has no {name!r} backend here{takes}; available: {', '.join(supported)}. "
            f"Choose one with actvar_kernels.set_backend or {ENVIRONMENT_VARIABLE}, or use 'auto'."
        )
    if name == "triton":
        if not triton_installed():
            raise BackendUnavailableError(f"{operation}: the 'triton' backend needs the triton package (Linux)")
        if not tensor.is_cuda and not interpreted():
            raise BackendUnavailableError(
                f"{operation}: the 'triton' backend needs CUDA tensors, got {tensor.device}; set TRITON_INTERPRET=1 "
                "before Python starts to run the kernels in Triton's interpreter"
            )
    return name


def cpp_takes(operation: str, reason: str | None) -> bool:
    """Whether a C++ kernel takes a call: if there is no `reason` against it.

    Raises:
        BackendUnavailableError: there is one, and the backend `"cpu"` was asked for by name.
    """
    if reason is not None and get_backend() == "cpu":
        raise BackendUnavailableError(f"{operation}: the 'cpu' backend cannot run this call: {reason}")
    return reason is None


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


def needs_operator(*tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through its registered operator: under `torch.compile`, where gradients are needed, and
    where a dispatch mode (a FLOP counter, fake tensors) wants to see it. Otherwise kernels are launched directly."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return wants_gradient(*tensors)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
