"""Run a linear layer, on the CPU with a weight that is packed once or read once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import choose, choose_eight_bits
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.linear import cpu_brgemm, cpu_kernel
from actvar_kernels.linear.eight_bits import multiply, quantize_rows
from actvar_kernels.linear.few_rows import norm_linear
from actvar_kernels.linear.quantized import quantized_linear
from actvar_kernels.triton_backend.row_form import ByteRows, NormedRows


def linear(
    x: torch.Tensor | ByteRows | NormedRows,
    weight: torch.Tensor,
    bias: torch.Tensor,
    quantized: torch.dtype | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`.

    C++ takes float32, bfloat16 and float16, sums in float32, and works on a packed copy of the weight. In 16 bits it
    takes PyTorch's products where the processor has tiles of them (AMX). Otherwise the product is PyTorch's.

    Args:
        x: `[..., C]`, floating-point; or such rows in eight bits, on Triton; or rows that `norm_linear` takes.
        weight: `[D, C]` in x's dtype, or in any under autocast. The copy stays as long as this tensor. A change of its
            version, address or dtype is seen; after others (through `.data`, by fused optimizers) call `actvar.refresh`
            on its module.
        bias: `[D]`, like the weight.
        quantized: `torch.int8` or `torch.float8_e4m3fn` for a product in eight bits, as
            `linear.quantized.quantized_linear` defines it, with a packed copy of one byte a number. Triton runs both on
            CUDA, and C++ int8 on the CPU. Products of int8 are equal bit for bit; those of float8_e4m3fn are summed in
            float32.

    Raises:
        BackendUnavailableError: see `actvar_kernels.set_backend`, and `backend.choose_eight_bits`.
    """
    if isinstance(x, NormedRows):
        return norm_linear(*x, weight, bias)
    if isinstance(x, ByteRows):
        backend = choose_eight_bits("linear", x.values.dtype, x.scales, weight, bias)
        return multiply(x, weight, bias, with_gelu=False, recorded=backend.recorded)
    dtype = cpu.computed_dtype(x)
    if quantized is not None:
        x = x.to(dtype)
        backend = choose_eight_bits("linear", quantized, x, weight, bias)
        if backend.name == "reference":
            return quantized_linear(x, weight, bias, quantized)
        if backend.name == "triton":
            rows = quantize_rows(x, None, quantized, backend.recorded)
            return multiply(rows, weight, bias, with_gelu=False, recorded=backend.recorded)
        return cpu_brgemm.linear(x, weight, bias, int8=True)
    if _runs_in_pytorch("linear", x, weight, bias):
        return F.linear(x, weight, bias)
    if brgemm.has_tiles(dtype):
        return cpu_brgemm.linear(x.to(dtype), weight, bias, int8=False)
    return cpu_kernel.linear(x if x.dtype == dtype else x.to(dtype), weight, bias)


def linear_once(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.T + bias` for a weight that is read once per sample, where a packed copy would not pay.

    C++ takes up to 8 rows of a multiple of 32 numbers. Otherwise the product is PyTorch's.

    Args:
        x: `[R, C]`, floating-point.
        weight, bias: `[D, C]` and `[D]` in x's dtype, or in any under autocast.

    Raises:
        BackendUnavailableError: see `actvar_kernels.set_backend`.
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
