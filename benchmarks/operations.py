"""The operations of one active block with random inputs of a model's shape: what benchmarks and GPU checks call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actvar_kernels.operations.inputs import BlockInputs
from actvar_kernels.operations.shapes import EXPERTS, MODELS, BlockShape, Model, share
from actvar_kernels.operations.table import BLOCK

SIZES = MODELS | {"fashion-mnist": Model(192, (1, 2, 3, 4, 6, 8))}
TIMED = (
    "select_tokens",
    "normalize_modulate",
    "subset_attention",
    "add_normalize_route",
    "expert_ffn_scatter dense",
    "expert_ffn_scatter tile_list",
    "scatter_rows",
)
"""Calls of an active block. They may be repeated, since what they write in place is the same every time."""
ERROR_FACTOR = 4
"""How many times as much as PyTorch's plain code in the same type an operation may err."""


def allowed_error(of_reference: float, dtype: torch.dtype) -> float:
    """Return the largest error against float64 of an operation whose reference errs by `of_reference` in `dtype`."""
    return ERROR_FACTOR * of_reference + torch.finfo(dtype).eps


def last_scale(model: str, batch: int, rate: float = 0.75) -> BlockShape:
    """Return the last scale of a model, two rows an image, with `rate` of tokens and experts at the last two scales.

    It has 16x16 tokens, 32x32 for d36, and 8x8 for fashion-mnist.
    """
    scale = SIZES[model].active_scales(rate)[1]
    return BlockShape(2 * batch, *scale, SIZES[model].width, active=share(rate, EXPERTS))


def operations(inputs: BlockInputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the calls of `TIMED`; each returns values to compare."""
    calls = {name: call for operation in BLOCK for name, call in operation.calls(inputs).items()}
    return {name: calls[name] for name in TIMED}
