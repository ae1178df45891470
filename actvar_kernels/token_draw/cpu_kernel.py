"""Run guidance, top-k, top-p and the draw in C++ on the CPU, from the random numbers of the Triton kernel."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from actvar_kernels.cpu_backend import building, cpu
from actvar_kernels.cpu_backend.building import Library

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / "public.cpp", FOLDER / "sample.cpp"]
HEADERS = [FOLDER / "filters.h", *(cpu.FOLDER / name for name in ("numbers.h", "keys.h"))]
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LIBRARY = Library("actvar_sampling", "the C++ samplers", "a few seconds", SOURCES, HEADERS, FLAGS, "sample_tokens")


def sample_tokens(
    logits: torch.Tensor,
    guidance: float | None,
    top_k: int,
    top_p: float,
    seed: int,
    step: int,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Return the tokens `[B, L]` int64 that the operation draws.

    Args:
        logits: `[2B, L, V]`, or `[B, L, V]` without guidance, floating-point, any strides.
        guidance: strength of classifier-free guidance, or None.
        top_k: 0 ... V; 0 keeps all.
        top_p: 0 ... 1; 0 keeps all.
        seed, step: integers that the random numbers are made of.
        noise: `[B, L, V]`, floating-point, any strides, instead of a seed; or None.
    """
    rows, L, V = cpu.checked_sizes(*logits.shape)
    logits = logits.detach() if logits.dtype == torch.bfloat16 else logits.detach().float()
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    noise = None if noise is None else noise.detach().float().contiguous()
    tokens = logits.new_empty(rows if guidance is None else rows // 2, L, dtype=torch.int64)
    failed = library().sample_tokens(
        logits.dtype == torch.bfloat16,
        guidance is not None,
        logits.data_ptr(),
        None if noise is None else noise.data_ptr(),
        tokens.data_ptr(),
        *tokens.shape,
        V,
        *logits.stride()[:2],
        1 + (guidance or 0.0),
        guidance or 0.0,
        top_k,
        top_p > 0,
        1 - top_p,
        seed,
        step,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a row of {V} logits")
    return tokens


def why_unavailable() -> str | None:
    """Return None if this library and that of the other kernels can be loaded, otherwise why not."""
    return cpu.why_unavailable() or _why_not_loaded()


def available() -> bool:
    """Return whether both libraries can be loaded; log once why not."""
    return cpu.available() and _loads()


@functools.cache
def _why_not_loaded() -> str | None:
    return building.why_not(library)


@functools.cache
def _loads() -> bool:
    return building.is_on(LIBRARY, _why_not_loaded(), "PyTorch draws the tokens")


@functools.cache
def library() -> ctypes.CDLL:
    """Return the loaded library of both samplers.

    Raises:
        BuildError: it can be neither found nor compiled.
    """
    loaded = building.load(LIBRARY)
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    real, double = ctypes.c_float, ctypes.c_double
    loaded.guide_and_filter.argtypes = (
        [integer] + 3 * [pointer] + 5 * [long] + [real, real, long, integer, real, integer]
    )
    loaded.draw.argtypes = 3 * [pointer] + 2 * [long] + [integer]
    loaded.sample_tokens.argtypes = (
        2 * [integer] + 3 * [pointer] + 5 * [long] + [real, real, long, integer, double, long, long, integer]
    )
    return loaded
