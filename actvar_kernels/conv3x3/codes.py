"""Add the codes of a scale to the features of an image, and average the sum on the grid of the next scale."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from actvar_kernels.backend import MOST_SEQUENCES, Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import as_integer, as_number, expect_one_device, expect_shape
from actvar_kernels.situation import wants_gradient

MOST_CHANNELS = 64
LIMITS = (
    f"float32, float16 and bfloat16, up to {MOST_CHANNELS} channels and {MOST_SEQUENCES} images, "
    "features without gaps, no gradient"
)


def add_codes(
    features: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    following: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add `(1 - ratio) * h + ratio * conv3x3(h)` to the features in place, for the enlarged codes h of one scale.

    Codes are enlarged by bicubic interpolation. Triton takes two launches for the sum and one for the average, and sums
    in float32. Elsewhere PyTorch's operations run.

    Args:
        features: the sum of the scales before, `[B, C, P, P]`, changed in place.
        tokens: of the scale, `[B, p * p]` int64, p at most P.
        codebook: `[V, C]`.
        weight, bias: of the convolution, `[C, C, 3, 3]` and `[C]`.
        ratio: share of the convolution.
        following: side q of the next scale's grid; 0 without a next scale.
        dtype: of the result; None for that of the features.

    Returns:
        the new sum averaged on the next grid, `[B, C, q, q]`, with neighbouring channels next to each other in memory
        where Triton runs.

    Raises:
        TypeError: tokens that are not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    B, C, side, _ = expect_shape("features", features, (None, None, None, None))
    expect_shape("features", features, (B, C, side, side))
    places = expect_shape("tokens", tokens, (B, None))[1]
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens: expected int64, got {tokens.dtype}")
    of_scale = round(places**0.5)
    if of_scale**2 != places or not 1 <= of_scale <= side:
        raise ValueError(f"tokens: expected a square of up to {side} x {side} of them, got {places}")
    expect_shape("codebook", codebook, (None, C))
    expect_shape("weight", weight, (C, C, 3, 3))
    expect_shape("bias", bias, (C,))
    expect_one_device(features, tokens, codebook, weight, bias)
    following, ratio = as_integer("following", following), as_number("ratio", ratio)
    if not 0 <= following <= side:
        raise ValueError(f"following: expected 0 to {side}, got {following}")
    dtype = features.dtype if dtype is None else dtype
    arguments = (features, tokens, codebook, weight, bias, ratio, following, dtype)
    backend = _choose(features, tokens, codebook, weight, bias)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.add_codes(*arguments)
    return _run(backend, *arguments)


def reference(
    features: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    following: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return what `add_codes` does, by PyTorch."""
    B, C, side, _ = features.shape
    of_scale = round(tokens.shape[1] ** 0.5)
    codes = F.embedding(tokens, codebook).transpose(1, 2).reshape(B, C, of_scale, of_scale)
    if of_scale != side:
        codes = F.interpolate(codes, size=(side, side), mode="bicubic")
    features.add_(codes.mul(1 - ratio) + F.conv2d(codes, weight, bias, padding=1).mul(ratio))
    if following == 0:
        return features.new_empty(B, C, 0, 0, dtype=dtype)
    return F.interpolate(features, size=(following, following), mode="area").to(dtype)


def _choose(
    features: torch.Tensor, tokens: torch.Tensor, codebook: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> Backend:
    """Return the backend of a call with these tensors."""
    tensors = (features, codebook, weight, bias)

    def takes_triton() -> bool:
        fits = features.shape[1] <= MOST_CHANNELS and features.shape[0] <= MOST_SEQUENCES and features.is_contiguous()
        return fits and in_kernel_dtypes(*tensors) and not wants_gradient(*tensors)

    return choose("add_codes", features, tokens, *tensors[1:], takes_triton=takes_triton, limits=LIMITS)


def _run(backend: Backend, *arguments) -> torch.Tensor:
    """Run the kernels of a backend."""
    if backend.name == "reference":
        return reference(*arguments)
    from actvar_kernels.conv3x3 import triton_codes

    return triton_codes.add_codes(*arguments)


@torch.library.custom_op("actvar_kernels::add_codes", mutates_args=("features",))
def _add_codes(
    features: torch.Tensor,
    tokens: torch.Tensor,
    codebook: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    ratio: float,
    following: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    backend = _choose(features, tokens, codebook, weight, bias)
    return _run(backend, features, tokens, codebook, weight, bias, ratio, following, dtype)


@_add_codes.register_fake
def _(features, tokens, codebook, weight, bias, ratio, following, dtype):
    B, C, _, _ = features.shape
    return features.new_empty(B, following, following, C, dtype=dtype).permute(0, 3, 1, 2)
