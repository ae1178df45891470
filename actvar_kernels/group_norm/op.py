"""Run what lies between the autoencoder's convolutions: GroupNorm and SiLU, residuals, and biases."""

from __future__ import annotations

import torch

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import as_integer, as_number, expect_one_device, expect_shape
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.group_norm import cpu_kernel, reference
from actvar_kernels.group_norm.tiles import group_norm_tiles

LIMITS = f"float32, float16 and bfloat16, up to {MOST_SEQUENCES} images"


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    offset: torch.Tensor | None = None,
    overwrite: bool = False,
    moments: torch.Tensor | None = None,
    part: int | None = None,
) -> torch.Tensor:
    """Return `F.silu(F.group_norm(x + offset, groups, weight, bias, eps))`, computed in float32.

    Triton takes three launches that read x twice, or with `moments` two that read it once. C++ takes channels in
    multiples of 16, without an offset. In both the result is in the memory format `channels_last`, in which x is
    fastest.

    Args:
        x: `[B, C, H, W]`, floating-point.
        weight, bias: `[C]`, floating-point.
        groups: number of groups of C / groups neighbouring channels.
        eps: what is added to the variance.
        silu: False leaves SiLU out.
        offset: `[C]`, floating-point, the bias of the convolution that x comes from; None: nothing is added.
        overwrite: whether x is not needed any more; in C++ the result takes its place.
        moments: those of x that `add_residual_moments` gave, or None. Only Triton reads them.
        part: positions of a part of the moments; None for the parts of `add_residual_moments`.

    Returns:
        `[B, C, H, W]` in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, groups that do not divide C, or a part that does not give as
            many parts as there are.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None, None))
    C = x.shape[1]
    for name, vector in (("weight", weight), ("bias", bias), ("offset", offset)):
        if vector is not None:
            expect_shape(name, vector, (C,))
    groups, eps = as_integer("groups", groups), as_number("eps", eps)
    if groups < 1 or C % groups:
        raise ValueError(f"groups: expected a divisor of {C} channels, got {groups}")
    if moments is not None:
        expect_shape("moments", moments, (x.shape[0], 2, None, C))
        if part is not None:
            positions, part = x.shape[2] * x.shape[3], as_integer("part", part)
            if part < 1 or -(-positions // part) != moments.shape[2]:
                raise ValueError(
                    f"part: expected {moments.shape[2]} parts of {positions} positions, got {part} in each"
                )
    expect_one_device(x, weight, bias, offset, moments)
    arguments = (x, weight, bias, groups, eps, silu, offset, moments, part)
    backend = _choose_norm(x, weight, bias, offset)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.group_norm_silu(*arguments)
    return _normalize(backend, *arguments, overwrite)


def add_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return `x + (update + bias)` with one rounding, in the wider dtype of `x` and `update`.

    Triton takes one launch, and the result is in the memory format `channels_last`.

    Args:
        x, update: `[B, C, H, W]`, floating-point.
        bias: `[C]`, floating-point, of the convolution that `update` comes from.

    Raises:
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_residual(x, update, bias)
    tensors = (x, update, bias)
    backend = _choose_residual(*tensors)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.add_residual(*tensors)
    return _add(backend, *tensors)


def add_residual_moments(
    x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `add_residual` does, and the moments of the result, which `group_norm_silu` takes.

    Triton takes one launch for both.

    Args:
        x, update, bias: as in `add_residual`.

    Returns:
        the sum, and `[B, 2, parts, C]` float32: mean and sum of squared deviations of every channel in every part of an
        image, in the parts of `actvar_kernels.group_norm.tiles`.

    Raises:
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_residual(x, update, bias)
    backend = _choose_residual(x, update, bias, "add_residual_moments")
    if backend.calls_operator:
        return torch.ops.actvar_kernels.add_residual_moments(x, update, bias)
    return _add_with_moments(backend, x, update, bias)


def _expect_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise unless the tensors fit each other."""
    expect_shape("x", x, (None, None, None, None))
    expect_shape("update", update, tuple(x.shape))
    expect_shape("bias", bias, (x.shape[1],))
    expect_one_device(x, update, bias)


def _choose_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, offset: torch.Tensor | None) -> Backend:
    """Return the backend of a call of `group_norm_silu` with these arguments."""

    def takes_triton() -> bool:
        offsets = () if offset is None else (offset,)
        return x.shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(x, weight, bias, *offsets)

    def why_not_in_cpp() -> str | None:
        if offset is not None or x.shape[1] % 16:
            return f"it takes channels in multiples of 16 and no offset, got {x.shape[1]} channels"
        return cpu.why_not(x)

    return choose(
        "group_norm_silu",
        x,
        weight,
        bias,
        offset,
        takes_triton=takes_triton,
        limits=LIMITS,
        why_not_in_cpp=why_not_in_cpp,
    )


def _choose_residual(
    x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor, operation: str = "add_residual"
) -> Backend:
    """Return the backend of a call of an operation with these arguments."""

    def takes_triton() -> bool:
        return x.shape[0] <= MOST_SEQUENCES and in_kernel_dtypes(x, update, bias)

    return choose(operation, x, update, bias, takes_triton=takes_triton, limits=LIMITS)


def _normalize(backend, x, weight, bias, groups, eps, silu, offset, moments, part, overwrite=False) -> torch.Tensor:
    if backend.name == "cpu":
        return cpu_kernel.group_norm_silu(x, weight, bias, groups, eps, silu, overwrite)
    if backend.name == "reference":
        return reference.group_norm_silu(x, weight, bias, groups, eps, silu, offset)
    from actvar_kernels.group_norm import triton_kernel

    return triton_kernel.group_norm_silu(x, weight, bias, groups, eps, silu, offset, moments, part)


def _add(backend, x, update, bias) -> torch.Tensor:
    if backend.name != "triton":
        return reference.add_residual(x, update, bias)
    from actvar_kernels.group_norm import triton_kernel

    return triton_kernel.add_residual(x, update, bias)


def _add_with_moments(backend, x, update, bias) -> tuple[torch.Tensor, torch.Tensor]:
    if backend.name != "triton":
        return reference.add_residual_moments(x, update, bias)
    from actvar_kernels.group_norm import triton_kernel

    return triton_kernel.add_residual_moments(x, update, bias)


@torch.library.custom_op("actvar_kernels::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    offset: torch.Tensor | None,
    moments: torch.Tensor | None,
    part: int | None,
) -> torch.Tensor:
    return _normalize(_choose_norm(x, weight, bias, offset), x, weight, bias, groups, eps, silu, offset, moments, part)


@_group_norm_silu.register_fake
def _(x, weight, bias, groups, eps, silu, offset, moments, part):
    return torch.empty_like(x, memory_format=torch.channels_last)


register_reference_gradient(_group_norm_silu, reference.group_norm_silu)


@torch.library.custom_op("actvar_kernels::add_residual", mutates_args=())
def _add_residual(x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _add(_choose_residual(x, update, bias), x, update, bias)


@_add_residual.register_fake
def _(x, update, bias):
    dtype = torch.promote_types(x.dtype, update.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


register_reference_gradient(_add_residual, reference.add_residual)


@torch.library.custom_op("actvar_kernels::add_residual_moments", mutates_args=())
def _add_residual_moments(
    x: torch.Tensor, update: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _add_with_moments(_choose_residual(x, update, bias, "add_residual_moments"), x, update, bias)


@_add_residual_moments.register_fake
def _(x, update, bias):
    B, C, H, W = x.shape
    dtype = torch.promote_types(x.dtype, update.dtype)
    parts = group_norm_tiles(B, H * W, C).parts if x.numel() else 1
    moments = torch.empty(B, 2, parts, C, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last), moments


register_reference_gradient(_add_residual_moments, reference.add_residual_moments)
