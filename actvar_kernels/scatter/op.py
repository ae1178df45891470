"""Put updated rows back among the tokens that keep their value."""

from __future__ import annotations

import torch

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_index, expect_one_device, expect_shape
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.scatter import reference
from actvar_kernels.situation import wants_gradient

_LIMITS = f"float32, float16 and bfloat16, up to {MOST_SEQUENCES} sequences"


def scatter_rows(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return `rest` after `rest[r, index[r, j]] = rows[r, j] + gamma[r] * update[r, j]`.

    Without gradients Triton and C++ write to `rest` and return it. Otherwise a copy is written to.

    Args:
        rest: `[R, L, C]`, floating-point, the rows that stay; None without an index.
        index: `[R, K]` int64 without repeats; None when every row was kept: the result is `[R, K, C]`.
        rows, update: `[R, K, C]`, floating-point.
        gamma: `[R, 1, C]`, floating-point, the gate of the branch by AdaLN.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("rows", rows, (None, None, None))
    if index is not None:
        R, _, C = expect_shape("rest", rest, (None, None, None))
        expect_index(index, (R, None))
        expect_shape("rows", rows, (*index.shape, C))
    R, K, C = rows.shape
    expect_shape("update", update, (R, K, C))
    expect_shape("gamma", gamma, (R, 1, C))
    expect_one_device(rows, update, gamma, *(() if index is None else (rest, index)))
    return scatter_checked(rest, index, rows, update, gamma)


def scatter_checked(
    base: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Do what `scatter_rows` does with arguments that fit each other, for operations that have checked them."""
    if index is None or base is None:
        return _add(rows, update, gamma)
    backend = _choose(base, rows, update, gamma)
    if backend.name == "reference":
        return reference.scatter_rows(base, index, rows, update, gamma)
    if wants_gradient(base, rows, update, gamma):
        return torch.ops.actvar_kernels.scatter_rows(base, index, rows, update, gamma)
    if backend.recorded:
        torch.ops.actvar_kernels.scatter_rows_(base, index, rows, update, gamma)
    else:
        _write(backend, base, index, rows, update, gamma)
    return base


def _add(rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return `rows + gamma * update`: in C++, or by one operation of PyTorch's."""
    backend = _choose(None, rows, update, gamma)
    if backend.name != "cpu":
        return torch.addcmul(rows, gamma.to(update.dtype), update)
    if backend.recorded:
        index = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
        return torch.ops.actvar_kernels.scatter_rows(rows, index, rows, update, gamma)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    row_ops.scatter_rows(out, None, rows, update, gamma)
    return out


def _choose(base: torch.Tensor | None, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor) -> Backend:
    """Return the backend of a call with these tensors; without `base` the result is new memory."""

    def takes_triton() -> bool:
        bases = () if base is None else (base,)
        return rows.shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(rows, update, gamma, *bases)

    return choose(
        "scatter_rows",
        rows,
        base,
        update,
        gamma,
        takes_triton=takes_triton,
        limits=_LIMITS,
        why_not_in_cpp=lambda: _why_not_in_cpp(base, rows, update, gamma),
        library_on_triton=base is None,
    )


def _why_not_in_cpp(base, rows, update, gamma) -> str | None:
    """Return why C++ does not take a call; under autocast the update may be in a lower dtype than the rows."""
    if base is not None and (base.dtype != rows.dtype or not base.is_contiguous()):
        return f"it writes to the base in {rows.dtype} without gaps, got {base.dtype} and strides {base.stride()}"
    if rows.dtype != torch.promote_types(rows.dtype, update.dtype):
        return f"it takes an update whose dtype {rows.dtype} holds, got {update.dtype}"
    return cpu.why_not(rows, update, gamma)


def _write(backend: Backend, base, index, rows, update, gamma) -> None:
    """Write the sum of `rows` and the update to `base`."""
    if backend.name == "cpu":
        row_ops.scatter_rows(base, index, rows, update, gamma)
    elif backend.name == "reference":
        base.copy_(reference.scatter_rows(base, index, rows, update, gamma))
    else:
        from actvar_kernels.scatter import triton_kernel

        triton_kernel.scatter_rows(base, index, rows, update, gamma)


@torch.library.custom_op("actvar_kernels::scatter_rows_", mutates_args=("base",))
def _scatter_rows_in_place(
    base: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> None:
    _write(_choose(base, rows, update, gamma), base, index, rows, update, gamma)


@torch.library.custom_op("actvar_kernels::scatter_rows", mutates_args=())
def _scatter_rows(
    base: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    out = base.clone()
    _write(_choose(out, rows, update, gamma), out, index, rows, update, gamma)
    return out


@_scatter_rows.register_fake
def _(base, index, rows, update, gamma):
    return torch.empty_like(base)


register_reference_gradient(_scatter_rows, reference.scatter_rows)
