"""Which tokens a block updates, and their rows ready for attention: score, top-K, gather, LayerNorm, modulation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.backend import backend_of
from actvar_kernels.checks import expect_count, expect_shape
from actvar_kernels.token_select import reference


class Selection(NamedTuple):
    """`index` `[R, K]` int64, ascending; `rows` `[R, K, C]` the kept rows of x; `modulated` `[R, K, C]` the same after
    LayerNorm and modulation, in x's dtype; `scores` `[R, L]` float32; `rest` `[R, L, C]` x's rows that were not kept,
    the others undefined: what the scattering operations fill and return."""

    index: torch.Tensor
    rows: torch.Tensor
    modulated: torch.Tensor
    scores: torch.Tensor
    rest: torch.Tensor


def select_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    keep: int,
    *,
    share_guidance: bool = False,
) -> Selection:
    """Keep the `keep` rows with the highest `LN(x) @ weight + bias` and modulate them: `LN(x) * (1 + scale) + shift`.

    LN has no affine part and eps 1e-6; scores are in float32 and outside autocast. Ties go to the lower index.

    Args:
        x: `[R, L, C]`, float32, float16 or bfloat16.
        weight, bias: the selector, `[1, C]` and `[1]`.
        scale, shift: AdaLN of the attention branch, `[R, 1, C]`.
        keep: rows to keep per sequence, 1 ... L.
        share_guidance: the first half of the R rows (conditional) decides for the second half as well.

    Raises:
        ValueError: shapes that do not fit, `keep` out of range, an odd R with `share_guidance`.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None))
    R, L, C = x.shape
    expect_shape("weight", weight, (1, C))
    expect_shape("bias", bias, (1,))
    expect_shape("scale", scale, (R, 1, C))
    expect_shape("shift", shift, (R, 1, C))
    expect_count("keep", keep, L)
    if share_guidance and R % 2:
        raise ValueError(f"share_guidance: expected conditional and unconditional rows in equal number, got {R} rows")
    backend_of("select_tokens", x, ("reference",))
    return Selection(*reference.select_tokens(x, weight, bias, scale, shift, keep, share_guidance))


def normalize_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`LN(x) * (1 + scale) + shift` in float32 (float64 for a float64 x), returned in x's dtype.

    Args:
        x: `[R, K, C]`.
        scale, shift: `[R, 1, C]`.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("x", x, (None, None, None))
    expect_shape("scale", scale, (x.shape[0], 1, x.shape[2]))
    expect_shape("shift", shift, (x.shape[0], 1, x.shape[2]))
    backend_of("normalize_modulate", x, ("reference",))
    return reference.normalize_modulate(x, scale, shift)
