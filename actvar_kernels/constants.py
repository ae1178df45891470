"""Name numbers and formats that several operations share."""

from __future__ import annotations

import torch

NORM_EPS = 1e-6
"""Number that the LayerNorm of a VAR adds to the variance."""
MAX_EXPERTS = 32
"""Experts that the Triton kernels can rank, and hold as the bits of an int32."""
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of numbers in eight bits, by the names that users know."""


def format_name(quantized: torch.dtype) -> str:
    """Return the name of a dtype of `FORMATS`."""
    return next(name for name, dtype in FORMATS.items() if dtype == quantized)
