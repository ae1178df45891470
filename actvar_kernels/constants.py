"""Name numbers that several operations share."""

NORM_EPS = 1e-6
"""Number that the LayerNorm of a VAR adds to the variance."""
MAX_EXPERTS = 32
"""Experts that the Triton kernels can rank, and hold as the bits of an int32."""
