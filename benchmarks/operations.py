"""Call the operations of one active block with random inputs of a model's shape, for benchmarks and GPU checks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actvar_kernels.operations.inputs import BlockInputs
from actvar_kernels.operations.table import BLOCK

TIMED = (
    "select_tokens",
    "normalize_modulate",
    "subset_attention",
    "add_normalize_route",
    "expert_ffn_scatter dense",
    "expert_ffn_scatter tile_list",
    "scatter_rows",
)
"""Calls of an active block that may be repeated, since they write the same in place every time."""
ERROR_FACTOR = 4
"""The error an operation may have, as a multiple of the error of PyTorch's plain code in the same type."""


class WrongNumbersError(RuntimeError):
    """Report that a provider's result is not what the reference computes in float64."""


def allowed_error(of_reference: float, dtype: torch.dtype) -> float:
    """Return the largest error against float64 of an operation whose reference errs by `of_reference` in `dtype`."""
    return ERROR_FACTOR * of_reference + torch.finfo(dtype).eps


def operations(inputs: BlockInputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls of `TIMED`; each returns values to compare."""
    calls = {name: call for operation in BLOCK for name, call in operation.calls(inputs).items()}
    return {name: calls[name] for name in TIMED}
