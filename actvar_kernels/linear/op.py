"""A linear layer; on the CPU with a weight that is packed once, or read once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import choose
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.linear import cpu_kernel


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Where kernels run in C++, so does this, in float32 or bfloat16 with sums in float32, on a packed copy of the weight;
    otherwise it is PyTorch's.

    Args:
        x: `[..., C]`.
        weight: `[D, C]`, a tensor that stays, since its copy is kept with it; with `bias` `[D]` in x's dtype, or in any
            under autocast. A change of its version, address or dtype is seen; after others (through `.data`, by fused
            optimizers) call `actvar.refresh` on its module.

    Raises:
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    if _runs_in_pytorch("linear", x, weight, bias):
        return F.linear(x, weight, bias)
    dtype = cpu.computed_dtype(x)
    return cpu_kernel.linear(x if x.dtype == dtype else x.to(dtype), weight, bias)


def linear_once(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias` on a weight that is read once per sample, which a packed copy would not pay for.

    In C++ where kernels run so, for up to 8 rows of a multiple of 32 numbers; otherwise it is PyTorch's.

    Args:
        x: `[R, C]`, with `weight` `[D, C]` and `bias` `[D]` in one dtype, or in any under autocast.
    """
    fits = x.shape[0] <= cpu_kernel.FEW_ROWS and x.shape[1] % 32 == 0 and weight.is_contiguous()
    if not fits or not x.dtype == weight.dtype == cpu.computed_dtype(x):
        return F.linear(x, weight, bias)
    if _runs_in_pytorch("linear_once", x, weight, bias):
        return F.linear(x, weight, bias)
    return cpu_kernel.unpacked_linear(x, weight, bias)


def _runs_in_pytorch(operation: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Return whether PyTorch's product runs, which is that of the Triton backend as well.

    Raises:
        BackendUnavailableError: `"cpu"` was asked for by name and does not take the call.
    """
    backend = choose(
        operation,
        x,
        weight,
        bias,
        why_not_in_cpp=lambda: cpu.why_not(dtype=cpu.computed_dtype(x)),
        library_on_triton=True,
        has_operator=False,
    )
    return backend.name != "cpu"
