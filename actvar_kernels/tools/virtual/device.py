"""Make tensors on a CUDA device that is not there.

They have shapes and no memory, also in a build of torch without CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from actvar_kernels.backend import interpreted
from actvar_kernels.cpu_backend.building import BuildError, Library, load, why_no_compiler

TORCH = Path(torch.__file__).parent
GUARD = Library(
    "actvar_device_guard",
    "a device guard",
    "a few seconds",
    [Path(__file__).with_name("device_guard.cpp")],
    [],
    [
        "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-isystem{TORCH / 'include'}",
        f"-L{TORCH / 'lib'}",
        "-lc10",
    ],
    "actvar_device_guard",
)


class VirtualGPUUnavailableError(RuntimeError):
    """Say that a virtual GPU cannot be set up here."""


@contextmanager
def fake_cuda_tensors() -> Iterator[None]:
    """Let `device="cuda"` make fake tensors in the context.

    Their `data_ptr()` is the offset in their storage, as if that began at 0.
    """
    if not torch.cuda.is_available():
        _install_device_guard()
    pointer = FakeTensor.__dict__.get("data_ptr")
    FakeTensor.data_ptr = _offset_in_storage
    try:
        with FakeTensorMode():
            yield
    finally:
        if pointer is None:
            del FakeTensor.data_ptr
        else:
            FakeTensor.data_ptr = pointer


def _offset_in_storage(self: Any) -> Any:
    """Return the bytes before a tensor in its storage."""
    return self.storage_offset() * self.element_size()


def to_fake_cuda(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put new fake tensors of the same shapes in place of the parameters and buffers of `module`, and return it.

    Args:
        module: on any device, such as meta.
        dtype: of floating-point tensors; None keeps theirs.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = nn.Parameter(_fake_like(parameter, dtype), requires_grad=parameter.requires_grad)
            part.register_parameter(name, fake)
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, _fake_like(buffer, dtype), name not in part._non_persistent_buffers_set)
    return module


def _fake_like(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a fake tensor like `tensor`, in `dtype` if that is given and `tensor` is floating-point."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cuda")


def why_unavailable() -> str | None:
    """Return why there can be no virtual GPU here, or None if there can."""
    if interpreted():
        return "kernels are compiled on it, so TRITON_INTERPRET must not be set"
    if torch.cuda.is_available():
        return None
    return why_no_compiler()


@functools.cache
def _install_device_guard() -> None:
    """Load the guard that torch asks for the current device."""
    try:
        load(GUARD)
    except BuildError as error:
        raise VirtualGPUUnavailableError(f"virtual GPU: {error}") from error
