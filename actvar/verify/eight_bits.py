"""Check the products of a model's blocks in eight bits: kernels against the reference, on rows of random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.families import blocks_of, family_of
from actvar.utils.devices import is_on_gpu
from actvar.utils.modes import no_grad
from actvar.verify.report import Check
from actvar.verify.rounding import difference
from actvar_kernels import expert_ffn, linear
from actvar_kernels.backend import using_backend
from actvar_kernels.constants import format_name
from actvar_kernels.expert_ffn import reference

ROWS = 37
EXPERTS = 16
MOST_APART = 0.25
"""Most that kernels may differ from the reference, as a part of the reference's own error.

GELU is rounded in another way, so that now and then a hidden unit becomes the next number in eight bits. Sums of fp8
are rounded in every step.
"""


@no_grad
def eight_bit_checks(var: nn.Module, quantized: torch.dtype) -> list[Check]:
    """Return checks of the linear layers of every block, those of int8 bit for bit, and of its experts.

    Args:
        var: a model on the CPU in float32 or bfloat16, or on a GPU.
        quantized: `torch.int8` or `torch.float8_e4m3fn`.

    Raises:
        BackendUnavailableError: such products do not run here.
    """
    family = family_of(var)
    generator, backend = torch.Generator().manual_seed(0), "triton" if is_on_gpu(var) else "cpu"
    checks, name = [], format_name(quantized)
    for index, block in enumerate(blocks_of(var)):
        dtype = str(next(block.parameters()).dtype).removeprefix("torch.")
        for weight in family.packed_weights(block):
            if weight is not None:
                errors = _of_layer(weight, generator, backend, quantized)
                checks.append(Check(f"linear, {name}", dtype, backend, "output", *errors, block=index))
        error, allowed = _distances(family.ffn_weights(block), generator, backend, quantized)
        checks.append(Check(f"expert_ffn, {name}", dtype, backend, "output", error, allowed, block=index))
    return checks


def _rows(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(ROWS, weight.shape[1], generator=generator).to(weight)


def _of_layer(
    weight: torch.Tensor, generator: torch.Generator, backend: str, quantized: torch.dtype
) -> tuple[float, ...]:
    """Return how many numbers of a layer without a bias differ from the reference's in int8, else as `_distances`."""
    arguments = _rows(weight, generator), weight, weight.new_zeros(len(weight))
    with using_backend("reference"):
        due = linear(*arguments, quantized)
    with using_backend(backend):
        found = linear(*arguments, quantized)
    if quantized == torch.int8:
        return (difference(found, due),)
    exact = F.linear(*(tensor.double() for tensor in arguments))
    return (found.double() - due.double()).norm().item(), MOST_APART * (due.double() - exact).norm().item()


def _distances(weights: Any, generator: torch.Generator, backend: str, quantized: torch.dtype) -> tuple[float, float]:
    """Return the distance of the experts from the reference, and what it may be at most."""
    hidden = len(weights[0])
    experts = next(count for count in range(EXPERTS, 0, -1) if hidden % count == 0)
    u = _rows(weights[0], generator)
    mask = (torch.rand(ROWS, experts, generator=generator) < 0.75).to(u.device)
    exact = reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    due = reference.quantized_expert_ffn(u, mask, *weights, quantized=quantized).double()
    with using_backend(backend):
        found = expert_ffn(u, mask, max(1, experts - 1), *weights, quantized=quantized).double()
    return (found - due).norm().item(), MOST_APART * (due - exact).norm().item()
