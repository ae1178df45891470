"""Put the virtual GPU together: fake tensors, the recording of torch's operations, and Triton's driver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from actvar_kernels.tools.virtual.aten import Recorder
from actvar_kernels.tools.virtual.cost import triton_cost
from actvar_kernels.tools.virtual.device import VirtualGPUUnavailableError, fake_cuda_tensors, why_unavailable
from actvar_kernels.tools.virtual.driver import SHARED_MEMORY_KIB, Architecture, VirtualDriver, active_driver
from actvar_kernels.tools.virtual.records import CompiledKernel, Launch, TensorInfo


class VirtualGPU:
    """Note down what a GPU would run.

    Attributes:
        arch: compute capability, or AMD's name of an architecture.
        launches: every kernel launch so far, in order.
        region: a name that the launches that follow are marked by, for the caller to set.
    """

    def __init__(self, arch: Architecture):
        self.arch = arch
        self.launches: list[Launch] = []
        self.region = ""

    def record(self, **fields) -> None:
        """Append the `Launch` with these fields."""
        self.launches.append(Launch(region=self.region, **fields))

    def record_triton(self, kernel: CompiledKernel, grid: tuple[int, int, int], arguments: dict[str, object]) -> None:
        """Append the launch of a Triton kernel."""
        described = {name: _described(value) for name, value in arguments.items()}
        cost = triton_cost(kernel.name, described)
        self.record(
            name=kernel.name,
            bytes=cost.bytes,
            flops=cost.flops,
            dtype=cost.dtype,
            kernel=kernel,
            grid=grid,
            arguments=described,
        )


@contextmanager
def virtual_gpu(arch: Architecture, *, limit_shared_memory: bool = True) -> Iterator[VirtualGPU]:
    """Make `device="cuda"` a GPU of this architecture in the context, which computes nothing.

    Tensors made inside are fake: they have shapes, dtypes and strides but no values. A Triton `kernel[grid](...)` is
    compiled with its arguments and noted down. So is every operation of torch that launches a kernel. Tensors made
    outside cannot take part, except numbers on the CPU. Triton's driver is put back at the end.

    Args:
        arch: compute capability, 80, 86, 89, 90, 100 or 120, or AMD's "gfx942" or "gfx1100".
        limit_shared_memory: whether to raise Triton's OutOfResources at the launch of a kernel that the GPU could not
            hold.

    Raises:
        ValueError: an unknown architecture.
        VirtualGPUUnavailableError: no C++ compiler that works in a torch without CUDA, or `TRITON_INTERPRET=1`.
        HostSyncError: inside, from an operation that makes the host wait for the GPU.
    """
    if arch not in SHARED_MEMORY_KIB:
        raise ValueError(f"arch: expected one of {list(SHARED_MEMORY_KIB)}, got {arch!r}")
    reason = why_unavailable()
    if reason is not None:
        raise VirtualGPUUnavailableError(f"virtual GPU: {reason}")
    gpu = VirtualGPU(arch)
    driver = VirtualDriver(arch, gpu.record_triton, limit_shared_memory)
    with active_driver(driver), fake_cuda_tensors(), Recorder(gpu.record):
        yield gpu


def _described(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return TensorInfo.of(value)
    if isinstance(value, TensorDescriptor):
        return TensorInfo(tuple(value.shape), tuple(value.strides), value.base.dtype)
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    return value
