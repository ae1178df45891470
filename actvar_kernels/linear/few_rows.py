"""Run a linear layer of few rows with the norm ahead of it, or with the residual behind it."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_one_device, expect_shape
from actvar_kernels.residual_norm.reference import Gated, Residual
from actvar_kernels.situation import wants_gradient
from actvar_kernels.token_select.reference import normalize_modulate

MOST_ROWS = 64
"""Rows of all sequences; with more, the rows that every program reads again outweigh the weights."""
MOST_CHANNELS = 2048
"""Channels of a row that a program normalises at once."""
LIMITS = (
    f"float32, float16 and bfloat16, rows and layer in one dtype, without a gradient, up to {MOST_ROWS} rows, and "
    f"norms of up to {MOST_CHANNELS} channels"
)


def norm_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    with_gelu: bool = False,
) -> torch.Tensor:
    """Return `(LN(x) * (1 + scale) + shift) @ weight.T + bias`, and `gelu_tanh` of it with GELU.

    LN is that of `normalize_modulate`, whose rows are rounded to x's dtype before the product. Triton takes one launch,
    in which every program normalises its rows again. This pays where rows are few, see `few_rows_pay`.

    Args:
        x: `[R, L, C]`, floating-point.
        scale, shift: `[R, 1, C]`, floating-point.
        weight, bias: `[D, C]` and `[D]`, in x's dtype.
        with_gelu: whether GELU follows.

    Returns:
        `[R, L, D]` in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    R, _, C = expect_shape("x", x, (None, None, None))
    for name, tensor in (("scale", scale), ("shift", shift)):
        expect_shape(name, tensor, (R, 1, C))
    D, _ = expect_shape("weight", weight, (None, C))
    expect_shape("bias", bias, (D,))
    expect_one_device(x, scale, shift, weight, bias)
    backend = _choose_norm_linear(x, scale, shift, weight, bias)
    arguments = (x, scale, shift, weight, bias, with_gelu)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.norm_linear(*arguments)
    return _run_norm_linear(backend, *arguments)


def linear_residual(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, onto: Gated) -> torch.Tensor:
    """Return `onto.rows + onto.gamma * (h @ weight.T + bias)`.

    Triton takes one launch. It rounds the product to h's dtype, and the sum once.

    Args:
        h: `[R, L, D]`, floating-point.
        weight, bias: `[C, D]` and `[C]`, in h's dtype.
        onto: rows `[R, L, C]` in h's dtype, and their gate.

    Returns:
        `[R, L, C]` in h's dtype.

    Raises:
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    rows, gamma = onto
    R, L, D = expect_shape("h", h, (None, None, None))
    C, _ = expect_shape("weight", weight, (None, D))
    expect_shape("bias", bias, (C,))
    expect_shape("rows", rows, (R, L, C))
    expect_shape("gamma", gamma, (R, 1, C))
    expect_one_device(h, weight, bias, rows, gamma)
    backend = _choose_linear_residual(h, weight, bias, rows, gamma)
    arguments = (h, weight, bias, rows, gamma)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.linear_residual(*arguments)
    return _run_linear_residual(backend, *arguments)


def norm_linear_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    with_gelu: bool,
) -> torch.Tensor:
    """Return what `norm_linear` does, by PyTorch."""
    y = F.linear(normalize_modulate(x, scale, shift), weight, bias)
    return F.gelu(y, approximate="tanh") if with_gelu else y


def linear_residual_reference(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """Return what `linear_residual` does, by PyTorch."""
    return Residual(rows, F.linear(h, weight, bias), gamma).rows(None)


def few_rows_pay(x: torch.Tensor, hidden: int) -> bool:
    """Return whether a dense block of rows `x` is measured to take less time with these operations, on Triton.

    They take 5 launches where the others take 7. Without a measured table the answer is False.

    Args:
        x: `[R, L, C]`, float32, float16 or bfloat16.
        hidden: hidden units of the FFN.

    Raises:
        OSError: see `tuning_table.read_table`.
        ValueError: see `tuning_table.read_table`; or the table is that of another GPU.
    """
    R, L, C = x.shape
    if R * L > MOST_ROWS or C > MOST_CHANNELS:
        return False
    from actvar_kernels.triton_backend.few_rows import few_rows_wanted

    return few_rows_wanted(x, hidden)


def _choose(
    operation: str, layer: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...], normed: int = 0
) -> Backend:
    """Return the backend of a call.

    Args:
        operation: its name.
        layer: tensors that must have the dtype of the first, rows `[R, L, C]`.
        others: tensors of AdaLN.
        normed: channels that are normalised.
    """

    def takes_triton() -> bool:
        (R, L, _), dtype = layer[0].shape, layer[0].dtype
        fits = R * L <= MOST_ROWS and normed <= MOST_CHANNELS and all(tensor.dtype == dtype for tensor in layer)
        return fits and in_kernel_dtypes(layer[0], *others) and not wants_gradient(*layer, *others)

    return choose(operation, *layer, *others, takes_triton=takes_triton, limits=LIMITS)


def _choose_norm_linear(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> Backend:
    return _choose("norm_linear", (x, weight, bias), (scale, shift), normed=x.shape[2])


def _choose_linear_residual(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor, gamma: torch.Tensor
) -> Backend:
    return _choose("linear_residual", (h, weight, bias, rows), (gamma,))


def _run_norm_linear(backend: Backend, *arguments) -> torch.Tensor:
    """Run the kernel of a backend."""
    if backend.name == "reference":
        return norm_linear_reference(*arguments)
    from actvar_kernels.linear import triton_few_rows

    return triton_few_rows.norm_linear(*arguments)


def _run_linear_residual(backend: Backend, *arguments) -> torch.Tensor:
    """Run the kernel of a backend."""
    if backend.name == "reference":
        return linear_residual_reference(*arguments)
    from actvar_kernels.linear import triton_few_rows

    return triton_few_rows.linear_residual(*arguments)


@torch.library.custom_op("actvar_kernels::norm_linear", mutates_args=())
def _norm_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    with_gelu: bool,
) -> torch.Tensor:
    layer = (x, scale, shift, weight, bias)
    return _run_norm_linear(_choose_norm_linear(*layer), *layer, with_gelu)


@_norm_linear.register_fake
def _(x, scale, shift, weight, bias, with_gelu):
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op("actvar_kernels::linear_residual", mutates_args=())
def _linear_residual(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    arguments = (h, weight, bias, rows, gamma)
    return _run_linear_residual(_choose_linear_residual(*arguments), *arguments)


@_linear_residual.register_fake
def _(h, weight, bias, rows, gamma):
    return rows.new_empty(rows.shape)


def _product_flops(rows: torch.Size, weight: torch.Size) -> int:
    """Return the FLOPs of the product of rows `[R, L, C]` with a weight `[D, C]`."""
    return 2 * rows[0] * rows[1] * weight[0] * weight[1]


@register_flop_formula(torch.ops.actvar_kernels.norm_linear)
def _(x_shape, _scale, _shift, weight_shape, *_others, **_kwargs) -> int:
    return _product_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.actvar_kernels.linear_residual)
def _(h_shape, weight_shape, *_others, **_kwargs) -> int:
    return _product_flops(h_shape, weight_shape)
