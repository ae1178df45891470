"""Run several linear layers of one input at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_one_device, expect_shape
from actvar_kernels.situation import wants_gradient

MOST_LAYERS = 64
"""Layers of one launch, each of which is two of its arguments."""
LIMITS = f"float32, float16 and bfloat16, one dtype for all, without a gradient, up to {MOST_LAYERS} layers"


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `x @ weight.T + bias` for each of several layers of the same sizes.

    Triton takes one launch, which reads every weight where it is. On the CPU PyTorch's product runs once for each.

    Args:
        x: `[R, C]`, floating-point.
        weights, biases: N layers, `[D, C]` and `[D]` each, in x's dtype.

    Returns:
        `[N, R, D]` in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, no layer, or another number of biases than of weights.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _, C = expect_shape("x", x, (None, None))
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights: expected as many as biases, at least 1, got {len(weights)} and {len(biases)}")
    D = expect_shape("weights[0]", weights[0], (None, C))[0]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        expect_shape(f"weights[{number}]", weight, (D, C))
        expect_shape(f"biases[{number}]", bias, (D,))
    expect_one_device(x, *weights, *biases)
    backend = _choose(x, weights, biases)
    if backend.calls_operator:
        return torch.ops.actvar_kernels.linears(x, list(weights), list(biases))
    return _run(backend, x, weights, biases)


def reference(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what `linears` does, by PyTorch."""
    return torch.stack([F.linear(x, *layer) for layer in zip(weights, biases, strict=True)])


def _choose(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> Backend:
    """Return the backend of a call with these tensors."""
    layers = (*weights, *biases)

    def takes_triton() -> bool:
        one_dtype = in_kernel_dtypes(x) and all(tensor.dtype == x.dtype for tensor in layers)
        return one_dtype and len(weights) <= MOST_LAYERS and not wants_gradient(x, *layers)

    return choose("linears", x, *layers, takes_triton=takes_triton, limits=LIMITS)


def _run(
    backend: Backend, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Run the kernel of a backend."""
    if backend.name == "reference":
        return reference(x, weights, biases)
    from actvar_kernels.linear import triton_linears

    return triton_linears.linears(x, weights, biases)


@torch.library.custom_op("actvar_kernels::linears", mutates_args=())
def _linears(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    return _run(_choose(x, weights, biases), x, weights, biases)


@_linears.register_fake
def _(x, weights, biases):
    return x.new_empty(len(weights), x.shape[0], weights[0].shape[0])


@register_flop_formula(torch.ops.actvar_kernels.linears)
def _(x_shape, weight_shapes, *_others, **_kwargs) -> int:
    return sum(2 * torch.Size(x_shape).numel() * shape[0] for shape in weight_shapes)
