"""Normalise the queries or keys of every head, and rotate them by the places of their tokens."""

from __future__ import annotations

import torch

from actvar_kernels.backend import MOST_SEQUENCES, REFERENCE, Backend, choose, get_backend, in_kernel_dtypes
from actvar_kernels.checks import expect_index, expect_one_device, expect_shape
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.rotary import reference

_HEAD_SIZES = (4, 8, 16, 32, 64, 128, 256)
_LIMITS = f"float32, float16 and bfloat16, heads of {', '.join(map(str, _HEAD_SIZES))}, up to {MOST_SEQUENCES} heads"


def rotate_heads(
    x: torch.Tensor, angles: torch.Tensor, index: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `rotate(scale[h] * x[r, h, j] / |x[r, h, j]|)`, computed in float32, or float64 for a float64 x.

    Each pair `(x[2i], x[2i + 1])` of a head is turned by the angle of its token and pair: `(c x[2i] - s x[2i + 1],
    s x[2i] + c x[2i + 1])` (rotary embeddings, https://arxiv.org/abs/2104.09864). Norms are at least 1e-12.

    Triton takes one launch, for heads of a power of two up to 256. On the CPU PyTorch's own operations run on every
    backend.

    Args:
        x: `[R, H, K, d]`, floating-point, d even, any strides.
        angles: cosine c and sine s of all tokens, `[2, L, d / 2]`, floating-point.
        index: the token of each row, `[R, K]` int64; None: row j is token j, K = L.
        scale: `[H]`, floating-point; None: ones.

    Returns:
        `[R, H, K, d]` in x's dtype.

    Raises:
        TypeError: an index that is not int64.
        ValueError: shapes or devices that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    R, H, K, d = expect_shape("x", x, (None, None, None, None))
    if d % 2:
        raise ValueError(f"x: expected heads of an even number of channels, got {d}")
    expect_shape("angles", angles, (2, K if index is None else None, d // 2))
    if index is not None:
        expect_index(index, (R, K))
    if scale is not None:
        expect_shape("scale", scale, (H,))
    expect_one_device(x, angles, index, scale)
    backend = _choose(x, angles, index, scale)
    if backend.name == "reference":
        return reference.rotate_heads(x, angles, index, scale)
    if backend.recorded:
        return torch.ops.actvar_kernels.rotate_heads(x, angles, index, scale)
    return _on_triton(x, angles, index, scale)


def _choose(x: torch.Tensor, angles: torch.Tensor, index: torch.Tensor | None, scale: torch.Tensor | None) -> Backend:
    """Return the backend of a call with these tensors."""
    if x.is_cpu and get_backend() != "triton":
        return REFERENCE
    optional = () if scale is None else (scale,)

    def takes_triton() -> bool:
        heads = x.shape[0] * x.shape[1]
        return x.shape[3] in _HEAD_SIZES and heads <= MOST_SEQUENCES and in_kernel_dtypes(x, angles, *optional)

    return choose("rotate_heads", x, angles, index, scale, takes_triton=takes_triton, limits=_LIMITS)


def _on_triton(x, angles, index, scale) -> torch.Tensor:
    from actvar_kernels.rotary import triton_kernel

    return triton_kernel.rotate_heads(x, angles, index, scale)


@torch.library.custom_op("actvar_kernels::rotate_heads", mutates_args=())
def _rotate_heads(
    x: torch.Tensor, angles: torch.Tensor, index: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    if _choose(x, angles, index, scale).name == "reference":
        return reference.rotate_heads(x, angles, index, scale)
    return _on_triton(x, angles, index, scale)


@_rotate_heads.register_fake
def _(x, angles, index, scale):
    return x.new_empty(x.shape)


register_reference_gradient(_rotate_heads, reference.rotate_heads)
