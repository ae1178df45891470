"""Load the C++ kernels for the CPU, compiled for every instruction set into one library."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from actvar_kernels.cpu_backend import building, memory
from actvar_kernels.cpu_backend.building import Library

FOLDER = Path(__file__).parent
SOURCES = (*sorted(FOLDER.glob("*.cpp")), *sorted(FOLDER.parent.glob("*/cpu_*.cpp")))
HEADERS = (*sorted(FOLDER.glob("*.h")), *sorted(FOLDER.parent.glob("*/cpu_*.h")))
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-Wno-ignored-attributes")
LIBRARY = Library("actvar_cpu", "the C++ kernels", "about a minute", SOURCES, HEADERS, FLAGS, "isa_name")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Name what the kernels take, in the order of FOR_EVERY_KIND in isa.h."""
TAKEN = "float32, bfloat16 and float16"
MOST = 2**30  # sizes and their sums are 32-bit integers in C++, offsets 64-bit ones


class Layout(NamedTuple):
    """Describe how weights are packed.

    Attributes:
        lanes: floats of a vector.
        vectors: vectors of a panel.
        step: rows that lie side by side.
    """

    lanes: int
    vectors: int
    step: int


def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16, as PyTorch sees it.

    Without them products take minutes that take seconds in float32.
    """
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_float16() -> bool:
    """Return whether this processor has instructions for products of float16, as PyTorch sees it."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def has_tiles() -> bool:
    """Return whether PyTorch multiplies tiles of bfloat16 (AMX), which takes a third of the time of vectors, or less.

    oneDNN reads the environment variable before its first product.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    is_let = "AMX" in most or most in ("DEFAULT", "ALL")
    return is_let and torch.cpu._is_amx_tile_supported() and multiplies_bfloat16()


@functools.cache
def why_unavailable() -> str | None:
    """Return None if the library can be loaded, otherwise why not. The first call compiles it where it is missing."""
    return building.why_not(library)


@functools.cache
def available() -> bool:
    """Return whether the library can be loaded; log once why not."""
    return building.is_on(LIBRARY, why_unavailable(), "PyTorch runs in their place and experts save no time")


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        BuildError: it can be neither found nor compiled.
    """
    loaded = building.load(LIBRARY)
    loaded.isa_name.restype = ctypes.c_char_p
    return loaded


@functools.cache
def best_isa() -> int:
    """Return the highest instruction set that this processor has."""
    return library().best_isa()


def isa_name(isa: int) -> str:
    """Return the name of an instruction set."""
    return library().isa_name(isa).decode()


@functools.cache
def layout_of(isa: int, dtype: torch.dtype) -> Layout:
    """Return how weights in `dtype` are packed for an instruction set; rows of bfloat16 alone may lie side by side."""
    numbers = (ctypes.c_int * 3)()
    library().isa_layout(isa, numbers)
    layout = Layout(*numbers)
    return layout if dtype == torch.bfloat16 else layout._replace(step=1)


def kind_of(dtype: torch.dtype) -> int:
    """Return the number by which C++ knows one of `DTYPES`."""
    return DTYPES.index(dtype)


def factors(isa: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an instruction set multiplies `dtype`: its own where there are products of pairs."""
    return dtype if layout_of(isa, dtype).step == 2 else torch.float32


def why_not(*tensors: torch.Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Return why the C++ kernels do not take CPU `tensors`, or compute in `dtype`; None if they do.

    The library is built if it is not there yet; a reason against that is logged once.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"it takes {TAKEN}, got {tensor.dtype}"
    if dtype is not None and dtype not in DTYPES:
        return f"it takes {TAKEN}, got {dtype}"
    reason = why_unavailable()
    if reason is not None:
        available()  # which logs the reason once
    return reason


def computed_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes `x`: its own, or that of autocast."""
    device = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def panels(weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return weights as the kernels read them, `[N, ...]`.

    For each panel of columns there are its rows, padded with zeros; `layout.step` of them lie side by side.

    Args:
        weight: `[N, K, columns]`, one of `DTYPES` or int8.
        layout: how weights are packed.
    """
    missing = -weight.shape[2] % layout.lanes, -weight.shape[1] % layout.step
    weight = F.pad(weight, (0, missing[0], 0, missing[1])) if any(missing) else weight
    N, K, columns = weight.shape
    out, begin = memory.empty_for_long((N, K * columns), weight.dtype), 0
    for panel in weight.split(layout.lanes * layout.vectors, dim=2):  # no copy lies between weight and panels
        rows = panel.unflatten(1, (-1, layout.step)).transpose(2, 3)  # [N, K / step, columns, step]
        out[:, begin : begin + K * panel.shape[2]].view(rows.shape).copy_(rows)
        begin += K * panel.shape[2]
    return out


def padded(vector: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return a contiguous tensor whose rows end with zeros up to a multiple of `lanes`.

    Args:
        vector: `[..., D]`, any dtype.
        lanes: numbers of a vector.
    """
    missing = -vector.shape[-1] % lanes
    return F.pad(vector, (0, missing)) if missing else vector.contiguous()


def checked_sizes(*sizes: int) -> tuple[int, ...]:
    """Return `sizes`.

    Raises:
        ValueError: one is more than the kernels count.
    """
    if max(sizes) > MOST:
        raise ValueError(f"expected at most {MOST} rows and columns, got {sizes}")
    return sizes
