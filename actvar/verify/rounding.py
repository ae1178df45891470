"""The tolerances of `actvar.verify.run`: how far rounding may move a value.

A tolerance is the largest of three numbers:

- `FACTOR` times the error of the reference in the same dtype against float64;
- `FACTOR` times half a unit in the last place of the largest value;
- `MOVES` times the effect of `moved` arguments.

The first may be very small by luck, but the third is the same on every processor. The third follows from how sums
are rounded:

1. Backends sum n products in float32, each in another order. The rounded sum is the exact sum of products that are
   changed by a relative `t sqrt(n) u`, `u = 2^-24`. That is so except with a probability of `2 n exp(-t^2 / 2)` (Higham
   and Mary 2019, "A new approach to probabilistic rounding error analysis"). So the rounding of a sum is a change of
   its arguments, and has the effect of this change on later steps.
2. An addition errs by at most u times its partial sum, with a variance of a third of the square of that bound.
   So n additions have a standard deviation of at most `sqrt(n / 3) u s`, where s is the largest partial sum.
3. `moved` changes a tensor by `sqrt(n) u` with random signs: one for each run of n, n / 2, n / 4, ... 1 elements of the
   summed axis. A sum moves by about `sqrt(n) u m`, where m is the root of the sum of squares of all runs' sums. Every
   partial sum consists of at most one run of each length, so m is about s or more. In a random order s^2 is on average
   below the square of the whole sum plus the squares of all products, which are runs too. So `MOVES` moves are at least
   `2 sqrt(3)`, or 3.5, standard deviations.
4. The other steps (LayerNorm's scaling, softmax, GELU, residuals) round by a few u, which is less than `sqrt(n) u`.

A fault of realistic size is far above: products of bfloat16 numbers err by `2^-9` of each product.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

FACTOR, MOVES = 4, 2
UNIT = 2.0**-24
"""Half a unit in the last place of 1 in float32, in which every backend sums."""


def unmoved(tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Return a tensor `[..., n]` in float64 with the same values; `length` is for `moved` alone."""
    return tensor.double()


def moved(tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Return a tensor in float64, changed as much as sums over its last axis may be rounded in float32.

    The signs of the changes are the same in every call.

    Args:
        tensor: `[..., n]`, of a floating-point dtype.
        length: products of a sum; n by default.
    """
    generator = torch.Generator().manual_seed(0)
    *rows, n = tensor.shape
    signs = torch.zeros(tensor.shape, dtype=torch.float64)
    run = n
    while run:
        run_signs = torch.randint(2, (*rows, -(-n // run)), generator=generator) * 2 - 1
        signs += run_signs.repeat_interleave(run, dim=-1)[..., :n]
        run //= 2
    change = math.sqrt(length or n) * UNIT
    return tensor.double() * (1 + change * signs.to(tensor.device))


def difference(value: torch.Tensor, due: torch.Tensor) -> float:
    """Return the largest error where `due` is in float64, otherwise the number of elements that differ."""
    if value.shape != due.shape:
        return math.inf
    if due.dtype != torch.float64:
        return float((value != due).sum())
    return (value - due).abs().max().item() if due.numel() else 0.0


def measured(
    value: torch.Tensor,
    due: torch.Tensor,
    reference: torch.Tensor,
    due_of_reference: torch.Tensor,
    due_if_moved: Callable[[], torch.Tensor],
) -> tuple[float, float]:
    """Return the error of `value` and its tolerance, which is 0 for what must be equal bit for bit.

    Args:
        value: of any shape, in a model's dtype.
        due: the exact value, in float64 for values with a tolerance.
        reference: the reference's value, in the dtype of `value`.
        due_of_reference: the reference's exact value, in float64.
        due_if_moved: returns `due` for `moved` arguments. It takes as long as `due` took, and is called only for an
            error above the other two limits.
    """
    error = difference(value, due)
    if due.dtype != torch.float64 or not due.numel():
        return error, 0.0
    rounding = torch.finfo(reference.dtype).eps / 2 * due.abs().max().item()
    tolerance = FACTOR * max(difference(reference, due_of_reference), rounding)
    if tolerance < error < math.inf:
        tolerance = max(tolerance, MOVES * difference(due_if_moved(), due))
    return error, tolerance
