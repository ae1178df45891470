"""Stand in for a Triton driver without a GPU: a launch compiles its kernel and is handed to a function.

Only this module depends on private interfaces of Triton. It was written with Triton 3.9; `make triton-matrix` runs it
on other releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

from actvar_kernels.tools.virtual.records import CompiledKernel

# KiB that one program can get.
SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
# Of A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090, MI300X and RX 7900 XTX.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170, "gfx942": 304, "gfx1100": 96}

Architecture = int | str
"""A compute capability of NVIDIA, or AMD's name of an architecture."""

Record = Callable[[CompiledKernel, tuple[int, int, int], dict[str, object]], None]
_UNLIMITED = 2**30
_LAUNCH_HEADER = 9  # grid x, y, z, stream, function, packed metadata, launch metadata, enter hook, exit hook


class VirtualDriver:
    """Answer what Triton asks of a driver between `kernel[grid](...)` and the launch.

    Args:
        arch: a key of `SHARED_MEMORY_KIB`.
        record: is called with every launch: kernel, grid, arguments by name.
        limit_shared_memory: whether to raise Triton's OutOfResources for kernels that the GPU could not hold.
    """

    def __init__(self, arch: Architecture, record: Record, limit_shared_memory: bool):
        self.arch, self.record = arch, record
        self.shared_memory = SHARED_MEMORY_KIB[arch] * 1024 if limit_shared_memory else _UNLIMITED
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        if isinstance(self.arch, int):
            return GPUTarget("cuda", self.arch, 32)
        return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)

    def get_current_device(self) -> int:
        """Return a number of the device.

        Triton keeps compiled kernels by device, so this must be no index of a real one.
        """
        return 1000 + list(SHARED_MEMORY_KIB).index(self.arch)

    def get_current_stream(self, device: int) -> int:
        """Return a number of the stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton reads of a device."""
        properties = {"max_shared_mem": _UNLIMITED, "multiprocessor_count": MULTIPROCESSORS[self.arch]}
        return {**properties, "max_num_regs": 65536, "warpSize": self.get_current_target().warp_size}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, bytes, int, int, int]:
        """Return what Triton keeps of a loaded kernel.

        There is no module to unload. The binary takes the place of a function handle. Registers, spills and the most
        threads follow.
        """
        return None, binary, 0, 0, 1024


class _Launcher:
    """Launch one compiled kernel; Triton keeps the object beyond the driver that made it."""

    def __init__(self, source, metadata):
        self.function, self.metadata, self.kernel = source.fn, metadata, None

    def __call__(self, *launch):
        driver = triton.runtime.driver.active
        header, values = launch[:_LAUNCH_HEADER], launch[_LAUNCH_HEADER:]
        names, binary = self.function.arg_names, header[4]
        if not isinstance(driver, VirtualDriver) or not isinstance(binary, bytes) or len(values) != len(names):
            raise RuntimeError(_unknown_triton("launches kernels"))
        needed = self.metadata.shared
        if needed > driver.shared_memory:
            raise OutOfResources(needed, driver.shared_memory, f"shared memory ({self.metadata.name})")
        if self.kernel is None:
            constants = {names[position]: values[position] for position in self.function.constexprs}
            self.kernel = _compiled(self.metadata, binary, constants)
        driver.record(self.kernel, header[:3], dict(zip(names, values, strict=True)))


def _compiled(metadata, binary: bytes, constants: dict[str, object]) -> CompiledKernel:
    """Return a kernel with what is known of it."""
    cache = get_cache_manager(metadata.hash)

    def code(kind: str) -> str:
        """Return the code of a stage of the compiler."""
        path = cache.get_file(f"{metadata.name[:150]}.{kind}")
        if path is None:
            raise RuntimeError(
                f"no {kind} of {metadata.name} in Triton's cache: unset TRITON_STORE_BINARY_ONLY and clear it"
            )
        return Path(path).read_text()

    return CompiledKernel(
        name=metadata.name,
        arch=metadata.target.arch,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared=metadata.shared,
        binary=binary,
        assembly=code("amdgcn") if metadata.target.backend == "hip" else None,
        ttir=code("ttir"),
        constants=constants,
        early=getattr(metadata, "launch_pdl", False),
    )


def _unknown_triton(what: str) -> str:
    """Return a message about a release of Triton that works in another way."""
    return (
        f"Triton {triton.__version__} {what} in a way that {__name__} does not know: "
        "use a release that `make triton-matrix` names, or adapt that module"
    )


@contextmanager
def active_driver(driver: VirtualDriver) -> Iterator[None]:
    """Make `driver` Triton's driver while the context is open."""
    config = cast(Any, triton.runtime.driver)  # whose type does not tell what this module relies on
    if not hasattr(config, "_active"):
        raise RuntimeError(_unknown_triton("keeps its driver"))
    previous = config._active
    config.set_active(driver)
    try:
        yield
    finally:
        config.set_active(previous)
