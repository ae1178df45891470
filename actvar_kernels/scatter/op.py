"""Put updated rows back among the tokens that keep their value."""

from __future__ import annotations

import torch

from actvar_kernels import cpu, cpu_rows
from actvar_kernels.backend import MOST_SEQUENCES, backend_of, kernel_backends, needs_operator
from actvar_kernels.checks import expect_index, expect_one_device, expect_shape
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.scatter import reference

_LIMITS = f"float32, float16 and bfloat16, up to {MOST_SEQUENCES} sequences"


def scatter_rows(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """`rest` with `rest[r, index[r, j]] = rows[r, j] + gamma[r] * update[r, j]`.

    Args:
        rest: `[R, L, C]`, the rows that stay; written to and returned on Triton and in C++ without gradients, else
            copied.
        index: `[R, K]` int64 without repeats. Both are None when every row was kept: the result is `[R, K, C]`.
        rows, update: `[R, K, C]`.
        gamma: AdaLN gate of the branch, `[R, 1, C]`.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("rows", rows, (None, None, None))
    if index is not None:
        expect_shape("rest", rest, (None, None, None))
        expect_index(index, (rest.shape[0], None))
        expect_shape("rows", rows, (*index.shape, rest.shape[2]))
    R, K, C = rows.shape
    expect_shape("update", update, (R, K, C))
    expect_shape("gamma", gamma, (R, 1, C))
    if index is None:
        expect_one_device(rows, update, gamma)
        if not (cpu.chosen(rows) and _cpp_takes(rows, rows, update, gamma)):
            return torch.addcmul(rows, gamma.to(update.dtype), update)
        rest = rows.new_empty(R, K, C)
        cpu_rows.scatter_rows(rest, None, rows, update, gamma)
        return rest
    tensors = (rest, rows, update, gamma)
    expect_one_device(*tensors, index)
    backend = _backend(*tensors)
    if backend == "cpu":
        cpu_rows.scatter_rows(rest, index, rows, update, gamma)
        return rest
    if backend == "reference":
        return reference.scatter_rows(rest, index, rows, update, gamma)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return torch.ops.actvar_kernels.scatter_rows(rest, index, rows, update, gamma)
    write = torch.ops.actvar_kernels.scatter_rows_ if needs_operator() else _write
    write(rest, index, rows, update, gamma)
    return rest


def _backend(*tensors: torch.Tensor) -> str:
    supported = kernel_backends(*tensors, fits=tensors[0].shape[0] <= MOST_SEQUENCES)
    return backend_of("scatter_rows", tensors[0], supported, _LIMITS, lambda: _cpp_takes(*tensors))


def _cpp_takes(rest, rows, update, gamma) -> bool:
    """In float32 or bfloat16; under autocast the update may be in a lower type than the rows."""
    fits = rest.dtype == rows.dtype == torch.promote_types(rows.dtype, update.dtype) and rest.is_contiguous()
    return fits and cpu_rows.takes(rest, rows, update, gamma)


def _write(rest, index, rows, update, gamma) -> None:
    if _backend(rest, rows, update, gamma) != "triton":
        rest.copy_(reference.scatter_rows(rest, index, rows, update, gamma))
        return
    from actvar_kernels.scatter import triton_kernel

    triton_kernel.scatter_rows(rest, index, rows, update, gamma)


@torch.library.custom_op("actvar_kernels::scatter_rows_", mutates_args=("rest",))
def _scatter_rows_in_place(
    rest: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> None:
    _write(rest, index, rows, update, gamma)


@torch.library.custom_op("actvar_kernels::scatter_rows", mutates_args=())
def _scatter_rows(
    rest: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    out = rest.clone()
    _write(out, index, rows, update, gamma)
    return out


@_scatter_rows.register_fake
def _(rest, index, rows, update, gamma):
    return torch.empty_like(rest)


register_reference_gradient(_scatter_rows, reference.scatter_rows)
