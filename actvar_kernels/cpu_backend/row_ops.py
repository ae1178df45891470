"""Run selection, LayerNorm, modulation, residual and routing in C++ on the CPU.

They take one or two passes over memory instead of PyTorch's several.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from actvar_kernels.constants import NORM_EPS
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.cpu_backend.packing import packed


def normalize_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return what `token_select.reference.normalize_modulate` does, with sums in float32."""
    return _normalize(x, None, None, None, scale, shift)[1]


def add_normalize(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `residual_norm.reference.add_normalize` does, with one rounding of the sum."""
    return _normalize(x, index, update, gamma, scale, shift)


def add_normalize_route(
    x: torch.Tensor,
    index: torch.Tensor | None,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `residual_norm.reference.add_normalize_route` does, with one rounding of the sum."""
    mask, logits, router = _router(update, weight, bias, active)
    return *_normalize(x, index, update, gamma, scale, shift, router), mask, logits


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mask and logits of rows `u` `[..., C]`, as `routing.reference.route_experts` does."""
    *rows, C = u.shape
    u = _with_neighbouring_channels(u.reshape(1, -1, C))
    mask, logits, router = _router(u, weight, bias, active)
    sizes = (1, u.shape[1], C, u.stride(0), u.stride(1))
    pointers = (u.data_ptr(), *(None,) * 7)
    _normalize_rows(u, pointers, sizes, router)
    return mask.view(*rows, -1), logits.view(*rows, -1)


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    share_guidance: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return index, modulated rows and scores, as `token_select.reference.select_tokens` does."""
    R, L, C = x.shape
    x = _with_neighbouring_channels(x)
    index = x.new_empty(R, keep, dtype=torch.int64)
    modulated = x.new_empty(R, keep, C)
    scores = x.new_empty(R, L, dtype=torch.float32)
    weight, bias, scale, shift = _float(weight), _float(bias), _float(scale), _float(shift)
    tensors = (x, weight, bias, scale, shift, scores, index, modulated)
    pointers = [t.data_ptr() for t in tensors]
    sizes = (R, L, keep, C, x.stride(0), x.stride(1), share_guidance)
    kind = cpu.best_isa(), cpu.kind_of(x.dtype)
    if _library().select_rows(*kind, *pointers, *sizes, NORM_EPS, torch.get_num_threads()):
        raise MemoryError(f"no memory for rows of {C} channels and {L} scores")
    return index, modulated, scores


def scatter_rows(
    base: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
) -> None:
    """Write what `scatter.reference.scatter_rows` returns to `base`, with one rounding.

    Args:
        base: `[R, L, C]`, one of `cpu.DTYPES`, with neighbouring channels.
        index: `[R, K]` int64; None: all rows of the base are written.
        rows: `[R, K, C]`, in the dtype of the base.
        update: `[R, K, C]`, in that dtype or a lower one.
        gamma: `[R, 1, C]`, floating-point.
    """
    R, K, C = rows.shape
    rows, update, gamma = rows.contiguous(), update.to(rows.dtype).contiguous(), _float(gamma)
    index = None if index is None else index.contiguous()
    _library().scatter_rows(
        cpu.best_isa(),
        cpu.kind_of(rows.dtype),
        base.data_ptr(),
        None if index is None else index.data_ptr(),
        rows.data_ptr(),
        update.data_ptr(),
        gamma.data_ptr(),
        *(R, K, C, base.stride(0), base.stride(1)),
        torch.get_num_threads(),
    )


class _Router(NamedTuple):
    """Hold what C++ takes of a router.

    Attributes:
        weight: `[N, C]` in panels.
        bias: `[N]` float32.
        logits, mask: `[R, K, N]` float32 and bool, which C++ fills.
        active: experts per row.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    logits: torch.Tensor
    mask: torch.Tensor
    active: int

    def arguments(self) -> tuple[int | None, ...]:
        """Return what C++ takes: pointers, the number of experts, those of a row."""
        pointers = (tensor.data_ptr() for tensor in (self.weight, self.bias, self.logits, self.mask))
        return *pointers, len(self.bias), self.active


_NO_ROUTER = None, None, None, None, 0, 0
"""Arguments without routing."""


def _router(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor, _Router]:
    """Return memory for the mask and the logits of `rows` `[R, K, C]`, and the router that fills it."""
    shape = *rows.shape[:2], weight.shape[0]
    mask, logits = rows.new_empty(shape, dtype=torch.bool), rows.new_empty(shape, dtype=torch.float32)
    layout = cpu.layout_of(cpu.best_isa(), torch.float32)
    weights = packed((weight,), ("router", layout), lambda: cpu.panels(weight.detach().float().t()[None], layout))
    return mask, logits, _Router(weights, _float(bias), logits, mask, active)


def _normalize(x, index, update, gamma, scale, shift, router: _Router | None = None) -> tuple[Any, torch.Tensor]:
    """Return the sum, or None without an update, and its LayerNorm with modulation."""
    R, L, C = x.shape
    x = _with_neighbouring_channels(x)
    kept = L if index is None else index.shape[1]
    out = x.new_empty(R, kept, C)
    total = None
    pointers = None, None, None
    if update is not None:
        total, gamma, update = torch.empty_like(out), _float(gamma), update.to(x.dtype).contiguous()
        index = None if index is None else index.contiguous()
        pointers = None if index is None else index.data_ptr(), update.data_ptr(), gamma.data_ptr()
    scale, shift = _float(scale), _float(shift)
    sums = None if total is None else total.data_ptr()
    pointers = (x.data_ptr(), *pointers, scale.data_ptr(), shift.data_ptr(), sums, out.data_ptr())
    _normalize_rows(x, pointers, (R, kept, C, x.stride(0), x.stride(1)), router)
    return total, out


def _normalize_rows(x: torch.Tensor, pointers: tuple, sizes: tuple[int, ...], router: _Router | None) -> None:
    """Call `add_normalize` of rows.cpp, whose arguments `pointers` and `sizes` are."""
    routing = _NO_ROUTER if router is None else router.arguments()
    kind = cpu.best_isa(), cpu.kind_of(x.dtype)
    arguments = (*pointers, *sizes, NORM_EPS, *routing, torch.get_num_threads())
    if _library().add_normalize(*kind, *arguments):
        raise MemoryError(f"no memory for a row of {x.shape[-1]} channels")


def _float(tensor: torch.Tensor) -> torch.Tensor:
    """Return a small tensor in contiguous float32, which is itself where it is that.

    A copy has to live as long as the call.
    """
    return tensor if tensor.dtype is torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def _with_neighbouring_channels(x: torch.Tensor) -> torch.Tensor:
    """Return `x` `[R, L, C]`, copied where its channels are not next to each other."""
    return x if x.stride(2) == 1 else x.contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    pointer, long, real, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    library.add_normalize.argtypes = (
        2 * [integer] + 8 * [pointer] + 5 * [long] + [real] + 4 * [pointer] + 2 * [long] + [integer]
    )
    library.select_rows.argtypes = 2 * [integer] + 8 * [pointer] + 6 * [long] + [integer, real, integer]
    library.scatter_rows.argtypes = 2 * [integer] + 5 * [pointer] + 5 * [long] + [integer]
    library.scatter_rows.restype = None
    return library
