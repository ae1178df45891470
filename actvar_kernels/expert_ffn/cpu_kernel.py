"""The expert FFN in C++: built once by torch's extension builder, weights packed once per layer."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from actvar_kernels.packing import packed

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_kernel.cpp", "cpu_tile.h"))
DTYPES = (torch.float32, torch.bfloat16)
MOST = 2**30  # sizes and their sums are 32-bit integers in C++, offsets 64-bit ones


class Layout(NamedTuple):
    """How weights are packed: floats of a vector, vectors of a panel, rows of bfloat16 that lie side by side."""

    lanes: int
    vectors: int
    step: int


class Packed(NamedTuple):
    """Weights of one FFN as `cpu_kernel.cpp` reads them; the biases are float32."""

    weight1: torch.Tensor
    bias1: torch.Tensor
    weight2: torch.Tensor
    bias2: torch.Tensor


@functools.cache
def why_unavailable() -> str | None:
    """None if the extension is built and loaded, which the first call does, else why it cannot be."""
    from actvar_kernels.building import why_no_compiler

    reason = why_no_compiler()
    if reason is not None:
        return reason
    try:
        _library()
    except (OSError, RuntimeError, ImportError) as error:
        return f"it does not build: {str(error).strip().splitlines()[0]}"
    return None


@functools.cache
def available() -> bool:
    """As `why_unavailable() is None`; the reason is logged once."""
    reason = why_unavailable()
    if reason is not None:
        logger.warning("the C++ kernel of expert_ffn is off, so experts save no time on this CPU: %s", reason)
    return reason is None


@functools.cache
def _library() -> ctypes.CDLL:
    from actvar_kernels.building import built

    path = built(
        "actvar_expert_ffn", SOURCES, ["-O3", "-fopenmp", "-Wno-psabi", "-Wno-ignored-attributes"], ["-fopenmp"]
    )
    library = ctypes.CDLL(str(path))
    library.level_name.restype = ctypes.c_char_p
    return library


def best_level() -> int:
    """The highest instruction set that this processor has."""
    return _library().best_level()


def level_name(level: int) -> str:
    return _library().level_name(level).decode()


def layout_of(level: int) -> Layout:
    numbers = (ctypes.c_int * 3)()
    _library().level_layout(level, numbers)
    return Layout(*numbers)


def expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    level: int | None = None,
) -> torch.Tensor:
    """As `reference.expert_ffn`, with sums in float32.

    Args:
        u: `[..., C]` float32 or bfloat16, C even; weights of another type are converted when they are packed.
        mask: bool.
        level: instruction set; None: the highest.

    Raises:
        ValueError: sizes that the kernel cannot count.
        MemoryError: there is none left for the intermediate results.
    """
    level = best_level() if level is None else level
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    C, experts = u.shape[-1], mask.shape[-1]
    layout = experts, u.dtype, level
    copies = packed(weights, layout, lambda: pack(*weights, experts, u.dtype, layout_of(level)))
    u, mask = u.contiguous(), mask.contiguous()
    out = torch.empty_like(u)
    tensors = (u, mask, *copies, out)
    sizes = (u.numel() // C, C, experts, fc1_weight.shape[0] // experts, torch.get_num_threads())
    if max(sizes) > MOST:
        raise ValueError(f"u: expected at most {MOST} tokens, channels and hidden units an expert, got {sizes[:4]}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    if _library().expert_ffn(level, int(u.dtype == torch.bfloat16), *pointers, *sizes):
        raise MemoryError(f"expert_ffn: no memory for {sizes[0]} tokens of width {C}")
    return out


@torch.no_grad()
def pack(
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    experts: int,
    dtype: torch.dtype,
    layout: Layout,
) -> Packed:
    """Panels of columns, each row after row, padded with zeros; per expert, input rows by output columns."""
    step = layout.step if dtype == torch.bfloat16 else 1
    up = fc1_weight.to(dtype).unflatten(0, (experts, -1)).transpose(1, 2)  # [N, C, width]
    down = fc2_weight.to(dtype).unflatten(1, (experts, -1)).permute(1, 2, 0)  # [N, width, C]
    bias1 = fc1_bias.float().view(experts, -1)
    return Packed(
        _panels(up, layout, step),
        F.pad(bias1, (0, -bias1.shape[1] % layout.lanes)).contiguous(),
        _panels(down, layout, step),
        F.pad(fc2_bias.float(), (0, -len(fc2_bias) % layout.lanes)).contiguous(),
    )


def _panels(weight: torch.Tensor, layout: Layout, step: int) -> torch.Tensor:
    """`[N, K, columns]` as `[N, ...]`: for each panel its columns, `step` rows side by side."""
    weight = F.pad(weight, (0, -weight.shape[2] % layout.lanes, 0, -weight.shape[1] % step))
    panels = weight.split(layout.lanes * layout.vectors, dim=2)
    return torch.cat([p.unflatten(1, (-1, step)).transpose(2, 3).flatten(1) for p in panels], dim=1)
