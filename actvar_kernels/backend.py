"""Choose which implementation an operation runs: `auto` picks one, a name asked for runs or raises.

`choose` decides once for each call of an operation, `choose_fused` once for a layer of a model. The body of a
registered operator decides anew, since a compiled graph may run where another backend is in force.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from actvar_kernels.constants import FORMATS, format_name
from actvar_kernels.cpu_backend import brgemm, choices, cpu
from actvar_kernels.situation import DIRECT, RECORDED, TORCH, situation, wants_gradient

BACKENDS = ("auto", "reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "ACTVAR_BACKEND"
MOST_SEQUENCES = 65535
"""Most programs along the second axis of a CUDA grid, where kernels have the rows R, or tiles of 64 or more tokens."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
E4M3_CAPABILITY = 89
"""Least compute capability, times ten, of a GPU that multiplies float8_e4m3fn."""

_chosen: str | None = None


class BackendUnavailableError(RuntimeError):
    """Say that a backend was asked for by name and cannot run the operation here."""


@dataclass(frozen=True)
class Backend:
    """Describe what runs a call.

    Attributes:
        name: `"reference"`, `"cpu"` or `"triton"`.
        recorded: whether gradients are wanted, or something wants to see registered operators: `torch.compile`, a FLOP
            counter, fake tensors.
    """

    name: str
    recorded: bool = False

    @property
    def calls_operator(self) -> bool:
        """Return whether the call must go through its registered operator, instead of launching the kernel."""
        return self.recorded and self.name != "reference"

    @property
    def fuses(self) -> bool:
        """Return whether kernels run.

        Kernels replace whole layers, and what a sample needs once is kept for them.
        """
        return self.name != "reference"

    @property
    def fuses_residual(self) -> bool:
        """Return whether sums are left to the operation that reads them.

        There this costs less than to write and read a sum.
        """
        return self.name == "triton"

    @property
    def packs_weights(self) -> bool:
        """Return whether products run on packed copies of the weights, and read vectors in float32 without gaps."""
        return self.name == "cpu"


_KINDS = {(name, recorded): Backend(name, recorded) for name in BACKENDS[1:] for recorded in (False, True)}
REFERENCE = _KINDS["reference", False]


def set_backend(name: str) -> None:
    """Choose the backend of every operation in this process, over the environment variable `ACTVAR_BACKEND`.

    The choice holds for all threads, also those that are at work.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: the name is unknown.
    """
    global _chosen
    _chosen = _checked(name, "set_backend")


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Choose the backend for the duration of the context.

    The choice holds for all threads, so only one thread at a time may be in such a context.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: the name is unknown.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "using_backend")
    try:
        yield
    finally:
        _chosen = before


def get_backend() -> str:
    """Return the name given to `set_backend`, otherwise that in `ACTVAR_BACKEND`, otherwise `"auto"`.

    Raises:
        ValueError: the environment variable holds an unknown name.
    """
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def choose(
    operation: str,
    *tensors: torch.Tensor | None,
    takes_triton: Callable[[], bool] | None = None,
    limits: str = "",
    why_not_in_cpp: Callable[[], str | None] | None = None,
    library_on_triton: bool = False,
    has_operator: bool = True,
) -> Backend:
    """Return the backend that runs one call of an operation.

    `auto` takes Triton for CUDA tensors where it is installed. It takes a C++ kernel for CPU tensors where there is one
    and no gradient is wanted, unless a table that `ACTVAR_TUNED` names says that the reference is faster here.
    A backend asked for by name runs or raises, with the gradients of the reference; no table overrules it.
    PyTorch's own operations run while it traces or transforms a call, see `situation`.
    Triton asked for by name also runs on CPU tensors when `TRITON_INTERPRET=1` was set before Triton was imported.

    Args:
        operation: name for errors.
        tensors: all that the operation reads; the first is one, and says on which device it runs.
        takes_triton: tells whether the Triton kernel takes the call; None: there is no such kernel.
        limits: what the Triton kernel takes, for the error.
        why_not_in_cpp: tells why the C++ kernel does not take the call, or None; None: there is no such kernel.
        library_on_triton: the Triton backend leaves the operation to PyTorch, as the reference does.
        has_operator: whether there is a registered operator of the kernels.

    Raises:
        BackendUnavailableError: the backend was asked for by name and cannot run this call here.
    """
    name = get_backend()
    first: torch.Tensor = tensors[0]  # pyright: ignore[reportAssignmentType] only others may be None
    if library_on_triton and (name == "triton" or first.is_cuda):
        return REFERENCE
    case = situation(*tensors)
    recorded = case == RECORDED
    if name == "auto":
        name = "reference"
        if case == TORCH:
            return REFERENCE
        if first.is_cuda:
            if triton_installed() and takes_triton is not None and takes_triton():
                name = "triton"
        elif case == DIRECT and first.is_cpu and why_not_in_cpp is not None and why_not_in_cpp() is None:
            name = choices.what_runs(operation, first) if choices.in_force() else "cpu"
        return _KINDS[name, recorded]
    if name == "reference":
        return _KINDS[name, recorded]
    if case == TORCH:
        raise BackendUnavailableError(
            f"{operation}: the {name!r} backend cannot run while PyTorch traces, exports or transforms the call, or on "
            "tensors of a subclass; use the backend 'auto' or 'reference' for that"
        )
    if name == "cpu":
        _expect_cpp(operation, first, why_not_in_cpp, recorded and not has_operator)
    elif takes_triton is None or not takes_triton():
        takes = f" (it takes {limits})" if limits else ""
        raise BackendUnavailableError(
            f"{operation} has no 'triton' backend here{takes}; available: reference. "
            f"Choose one with actvar_kernels.set_backend or {ENVIRONMENT_VARIABLE}, or use 'auto'."
        )
    else:
        _expect_triton(operation, first)
    return _KINDS[name, recorded]


def _expect_cpp(
    operation: str, tensor: torch.Tensor, why_not: Callable[[], str | None] | None, needs_missing_operator: bool
) -> None:
    """Raise BackendUnavailableError unless a C++ kernel runs a call, whose first tensor is `tensor`."""
    reason = None
    if not tensor.is_cpu:
        reason = f"it needs CPU tensors, got {tensor.device}"
    elif why_not is None:
        reason = "there is no C++ kernel for it"
    elif needs_missing_operator:
        reason = "it has no gradient, and no registered operator for what records the call"
    elif not torch.compiler.is_compiling():  # otherwise the operator asks when it runs
        reason = why_not()
    if reason is not None:
        raise BackendUnavailableError(f"{operation}: the 'cpu' backend cannot run this call: {reason}")


def _expect_triton(operation: str, tensor: torch.Tensor) -> None:
    """Raise BackendUnavailableError unless Triton runs here on tensors like `tensor`."""
    if not triton_installed():
        raise BackendUnavailableError(f"{operation}: the 'triton' backend needs the triton package (Linux)")
    if not tensor.is_cuda and not interpreted():
        raise BackendUnavailableError(
            f"{operation}: the 'triton' backend needs CUDA tensors, got {tensor.device}; set TRITON_INTERPRET=1 "
            "before Python starts to run the kernels in Triton's interpreter"
        )


def choose_eight_bits(operation: str, quantized: torch.dtype, *tensors: torch.Tensor) -> Backend:
    """Return the backend that runs one call of an operation in eight bits: C++, Triton, or the reference.

    `auto` takes Triton for CUDA tensors and C++ for those on the CPU, and the reference while PyTorch traces or
    transforms the call. It does not fall back to the reference where there are no such products, since that would take
    many times longer than other weights.

    Args:
        operation: name for errors.
        quantized: dtype of the factors, one of `FORMATS`.
        tensors: floating-point tensors that the operation reads, the first of them its input.

    Raises:
        BackendUnavailableError: the call wants a gradient, or the backend in force has no such products here.
        ValueError: another dtype.
    """
    if quantized not in FORMATS.values():
        raise ValueError(f"quantized: expected one of {', '.join(map(str, FORMATS.values()))}, got {quantized}")
    name, first, case = get_backend(), tensors[0], situation(*tensors)
    on_triton = name == "triton" or (name == "auto" and first.is_cuda)
    if wants_gradient(*tensors):
        reason = "it has no gradient; call it under torch.no_grad()"
    elif name == "reference" or (name == "auto" and (case == TORCH or (first.is_cpu and case != DIRECT))):
        return REFERENCE
    elif case == TORCH or (case != DIRECT and not on_triton):
        reason = "kernels cannot run while PyTorch traces, exports or transforms the call, or on tensors of a subclass"
    elif cpu.computed_dtype(first) not in KERNEL_DTYPES:
        reason = f"it takes {cpu.TAKEN}, got {cpu.computed_dtype(first)}"
    else:
        if on_triton:
            _expect_triton(operation, first)
        reason = why_not_in_eight_bits(quantized, first.device)
        if reason is None:
            return _KINDS["triton" if on_triton else "cpu", case == RECORDED]
    raise BackendUnavailableError(f"{operation} in {format_name(quantized)} cannot run this call: {reason}")


def why_not_in_eight_bits(quantized: torch.dtype, device: torch.device) -> str | None:
    """Return why products in eight bits do not run on a device with the backend in force, or None.

    Args:
        quantized: dtype of the factors, one of `FORMATS`.
        device: where they are.
    """
    name, floating = get_backend(), quantized.is_floating_point
    if name == "reference":
        return None
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        if not triton_installed():
            return "the package triton is not there"
        return _why_not_e4m3() if floating and device.type == "cuda" else None
    if device.type != "cpu":
        return f"it runs on CPUs and on CUDA, got the device {device} and the backend {name!r}"
    if floating:
        return "C++ has no products of fp8; use int8, a GPU, or ACTVAR_BACKEND=reference, which is slow"
    if brgemm.runs(torch.int8):
        return None
    return cpu.why_unavailable() or (
        "this processor, or this PyTorch, has no products of bytes (AVX-512 with VNNI); use weights of 16 or 32 bits, "
        "or the backend 'reference', which is slow"
    )


def _why_not_e4m3() -> str | None:
    """Return why the GPU in use has no products of float8_e4m3fn, or None."""
    import triton

    target: Any = triton.runtime.driver.active.get_current_target()  # whose type does not tell what drivers give
    if target.backend == "cuda" and target.arch >= E4M3_CAPABILITY:
        return None
    return (
        "fp8 (e4m3fn) needs a GPU of NVIDIA with compute capability 8.9 or higher, "
        f"got {target.backend} {target.arch}; use int8"
    )


def choose_fused(x: torch.Tensor) -> Backend:
    """Return the backend whose kernels replace a layer of a model; the reference where the layer's own code runs.

    C++ replaces layers where gradients are off and nothing is compiled, Triton everywhere.

    Args:
        x: the layer's input, of any shape and dtype.

    Raises:
        BackendUnavailableError: a backend was asked for by name, and does not take the dtype or cannot run here.
    """
    name = get_backend()
    if name == "reference" or situation(x) == TORCH:
        return REFERENCE
    if name == "triton":
        _expect_triton("the model", x)
    elif x.is_cpu:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return REFERENCE
        reason = cpu.why_not(dtype=cpu.computed_dtype(x))
        if reason is not None and name == "cpu":
            raise BackendUnavailableError(f"the 'cpu' backend cannot run the model: {reason}")
        return _KINDS["cpu" if reason is None else "reference", False]
    elif name == "cpu" or not x.is_cuda or not triton_installed():
        return REFERENCE
    return _KINDS["triton" if x.dtype in KERNEL_DTYPES else "reference", False]


def backend_of(
    operation: str,
    *tensors: torch.Tensor | None,
    supported: tuple[str, ...] = ("reference", "triton"),
    limits: str = "",
    why_not_in_cpp: Callable[[], str | None] | None = None,
    library_on_triton: bool = False,
) -> str:
    """Return the name of the backend that runs one call of an operation: `"reference"`, `"cpu"` or `"triton"`.

    Args:
        operation, tensors, limits, why_not_in_cpp, library_on_triton: as in `choose`.
        supported: which of the reference and Triton can run the call.

    Raises:
        BackendUnavailableError: the backend was asked for by name and cannot run this call here.
    """
    return choose(
        operation,
        *tensors,
        takes_triton=lambda: "triton" in supported,
        limits=limits,
        why_not_in_cpp=why_not_in_cpp,
        library_on_triton=library_on_triton,
    ).name


def cpp_runs(x: torch.Tensor) -> bool:
    """Return whether kernels in C++ replace layers for an input like `x`, see `choose_fused`."""
    return choose_fused(x).name == "cpu"


def triton_runs(*tensors: torch.Tensor) -> bool:
    """Return whether Triton kernels replace layers for inputs like all of `tensors`, see `choose_fused`."""
    return all(choose_fused(tensor).name == "triton" for tensor in tensors)


def in_kernel_dtypes(*tensors: torch.Tensor) -> bool:
    """Return whether Triton kernels take the dtypes of all `tensors`."""
    return all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)


@functools.cache
def triton_installed() -> bool:
    """Return whether the triton package is there."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str, source: str) -> str:
    """Return `name`; raise ValueError unless it is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
