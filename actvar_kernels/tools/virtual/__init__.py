"""Run code for CUDA on a GPU that is not there.

Every launch is compiled and noted down instead.
"""

from actvar_kernels.tools.virtual.aten import HostSyncError
from actvar_kernels.tools.virtual.device import VirtualGPUUnavailableError, to_fake_cuda, why_unavailable
from actvar_kernels.tools.virtual.gpu import VirtualGPU, virtual_gpu
from actvar_kernels.tools.virtual.records import CompiledKernel, Launch, TensorInfo

__all__ = [
    "CompiledKernel",
    "HostSyncError",
    "Launch",
    "TensorInfo",
    "VirtualGPU",
    "VirtualGPUUnavailableError",
    "to_fake_cuda",
    "virtual_gpu",
    "why_unavailable",
]
