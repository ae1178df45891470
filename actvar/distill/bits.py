"""Keep the bits of a token as one number, so that token maps of Infinity lie in a file like those of VAR."""

from __future__ import annotations

import torch

MOST_BITS = 63
"""Bits of a non-negative int64."""


def as_numbers(bits: torch.Tensor) -> torch.Tensor:
    """Return bits `[..., n]` as numbers `[...]` int64, the first bit worth 1.

    Raises:
        ValueError: more bits than a number has.
    """
    count = bits.shape[-1]
    if count > MOST_BITS:
        raise ValueError(f"bits: expected at most {MOST_BITS} of a token, got {count}")
    return (bits.long() << torch.arange(count, device=bits.device)).sum(dim=-1)


def as_bits(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first `count` bits of numbers `[...]` of an integer dtype, `[..., count]` uint8."""
    places = torch.arange(count, device=numbers.device)
    return (numbers.long().unsqueeze(-1) >> places & 1).to(torch.uint8)
