"""LayerNorm, modulation and residual in C++ on the CPU: one pass over memory in place of PyTorch's several."""

from __future__ import annotations

import ctypes

import torch

from actvar_kernels import cpu
from actvar_kernels.backend import get_backend, needs_operator
from actvar_kernels.token_select.reference import NORM_EPS

DTYPES = cpu.DTYPES


def runs(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the C++ code takes these tensors under the chosen backend: on the CPU in float32 or bfloat16, where the
    registered operator need not be called; and whether it can be built, which is tried only then."""
    return (
        get_backend() in ("auto", "cpu")
        and all(t.device.type == "cpu" and t.dtype in DTYPES for t in (x, *others))
        and not needs_operator(x, *others)
        and cpu.available()
    )


def normalize_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As `token_select.reference.normalize_modulate`, with sums in float32."""
    return _launch(x, None, None, None, scale, shift)[1]


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `residual_norm.reference.add_normalize`, with one rounding of the sum."""
    return _launch(x, index, update.to(x.dtype), gamma, scale, shift)


def _launch(x, index, update, gamma, scale, shift) -> tuple[torch.Tensor | None, torch.Tensor]:
    R, L, C = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    kept = L if index is None else index.shape[1]
    out = x.new_empty(R, kept, C)
    total = None if update is None else x.new_empty(R, kept, C)
    # float32 copies of small tensors, which live as long as the call
    gamma, scale, shift = (None if t is None else t.float().contiguous() for t in (gamma, scale, shift))
    update, index = (None if t is None else t.contiguous() for t in (update, index))
    pointers = [None if t is None else t.data_ptr() for t in (x, index, update, gamma, scale, shift, total, out)]
    sizes = (R, kept, C, x.stride(0), x.stride(1))
    if cpu.library().add_normalize(
        int(x.dtype == torch.bfloat16),
        *map(ctypes.c_void_p, pointers),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(NORM_EPS),
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory for a row of {C} channels")
    return total, out
