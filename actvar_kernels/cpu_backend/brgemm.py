"""Find PyTorch's products for small blocks of a matrix, `at::native::cpublas::brgemm`, and say which run here.

They are oneDNN's and use what the processor has: AMX, or AVX-512 with bfloat16 or VNNI. `ONEDNN_MAX_CPU_ISA` makes
oneDNN take a processor for a lesser one.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from actvar_kernels.cpu_backend import cpu
from actvar_kernels.cpu_backend.cpu import Layout

_SYMBOLS = (
    "_ZN2at6native7cpublas6brgemmEllllllbPKhPKaPib",
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
    "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb",
    "_ZN2at6native7cpublas14brgemm_releaseEb",
)
"""Mangled names of the products, in the order of `LAYOUTS`, and of what ends a thread's work."""
LAYOUTS = {torch.int8: Layout(64, 1, 4), torch.bfloat16: Layout(64, 1, 2), torch.float16: Layout(64, 1, 2)}
"""Say how weights are packed; `WIDTH` in brgemm.h."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library of the C++ kernels, which knows PyTorch's products from here on.

    Raises:
        BuildError: the library can be neither found nor compiled.
        OSError, AttributeError: PyTorch has no such products on this system, or in this version.
    """
    of_pytorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    found = cpu.library()
    found.set_brgemm.argtypes, found.set_brgemm.restype = len(_SYMBOLS) * [ctypes.c_void_p], None
    found.set_brgemm(*(ctypes.cast(getattr(of_pytorch, symbol), ctypes.c_void_p) for symbol in _SYMBOLS))
    return found


@functools.cache
def runs(dtype: torch.dtype) -> bool:
    """Return whether products of `dtype`, one of `LAYOUTS`, run on this processor, with this PyTorch.

    Those of float16 take pairs of rows, as all do here, with AMX-FP16 alone.
    """
    if cpu.why_unavailable() is not None:
        return False
    try:
        return bool(library().brgemm_works(list(LAYOUTS).index(dtype)))
    except (OSError, AttributeError):
        return False


def description() -> str:
    """Return one line about whose products run."""
    bfloat16, float16 = ("PyTorch (AMX)" if has_tiles(dtype) else "this package" for dtype in cpu.DTYPES[1:])
    int8 = "by PyTorch" if runs(torch.int8) else "not here (no VNNI)"
    return f"bfloat16 by {bfloat16}, float16 by {float16}, int8 {int8}"


def has_tiles(dtype: torch.dtype) -> bool:
    """Return whether PyTorch's products of `dtype` run on tiles (AMX), and so take less time than this package's."""
    return (dtype == torch.float16 or (dtype == torch.bfloat16 and cpu.has_tiles())) and runs(dtype)
