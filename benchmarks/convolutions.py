"""Time convolutions of the decoder on the CPU by all who can compute them: PyTorch, the C++ kernel and oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from actvar_kernels.conv3x3 import cpu_kernel
from actvar_kernels.cpu_backend import cpu
from benchmarks.operations import WrongNumbersError, allowed_error

LAYERS = {"fashion-mnist": ((64, 8), (32, 32)), "d16": ((640, 16), (320, 64), (160, 256))}
"""Channels and sides of maps in the decoder of a model."""
ROWS_CHECKED = 4

Call = Callable[[], torch.Tensor]


def convolution_providers(model: str, batch: int, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """Return by operation and provider a call that convolves a map, and one that enlarges it first.

    Args:
        model: a key of `LAYERS`.
        batch: images.
        dtype: float32, or bfloat16 where the processor multiplies it.

    Raises:
        WrongNumbersError: the values of a provider differ from those in float64.
    """
    found = {}
    generator = torch.Generator().manual_seed(0)
    for width, side in LAYERS[model]:
        for enlarge in (False, True):
            small = side // 2 if enlarge else side
            x = torch.randn(batch, width, small, small, generator=generator)
            weight = torch.randn(width, width, 3, 3, generator=generator) / (9 * width) ** 0.5
            bias = torch.randn(width, generator=generator)
            x = x.to(dtype, memory_format=torch.channels_last)
            layer = x, weight.to(dtype), bias.to(dtype)
            ways: dict[str, Call] = {"torch": partial(_by_torch, *layer, enlarge)}
            if cpu.available():
                ways["cpu"] = partial(cpu_kernel.conv3x3, *layer, enlarge=enlarge, engine="C++")
                ways["oneDNN"] = partial(cpu_kernel.conv3x3, *layer, enlarge=enlarge, engine="oneDNN")
            operation = f"conv3x3{' enlarged' if enlarge else ''} {width}x{side}x{side}"
            _check(operation, ways, layer, enlarge)
            found[operation] = ways
    return found


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, enlarge: bool) -> torch.Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest") if enlarge else x, weight, bias, padding=1)


@torch.no_grad()
def _check(operation: str, ways: dict[str, Call], layer: tuple[torch.Tensor, ...], enlarge: bool) -> None:
    """Hold the first rows of the first image to those in float64."""
    x, weight, bias = layer
    rows = slice(0, ROWS_CHECKED)
    first = x[:1, :, : ROWS_CHECKED + 1]
    truth = _by_torch(first.double(), weight.double(), bias.double(), enlarge)[:, :, rows]
    errors = {name: (run()[:1, :, rows].double() - truth).abs().max().item() for name, run in ways.items()}
    allowed = allowed_error(errors["torch"], x.dtype)
    for provider, error in errors.items():
        if not error <= allowed:
            raise WrongNumbersError(
                f"{operation}: {provider} errs by {error:.3g} against float64, expected at most "
                f"{allowed:.3g}; not timed"
            )
