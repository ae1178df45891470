"""Between attention and FFN: residual, LayerNorm, modulation, and the router's choice of experts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from actvar_kernels.backend import backend_of
from actvar_kernels.checks import expect_count, expect_shape
from actvar_kernels.residual_norm import reference


class Routed(NamedTuple):
    """`rows` `[R, K, C]` after the residual; `u` `[R, K, C]` the FFN's input; `mask` `[R, K, N]` bool, the experts that
    run; `logits` `[R, K, N]` float32."""

    rows: torch.Tensor
    u: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor


def add_normalize(
    rows: torch.Tensor, update: torch.Tensor, gamma: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows + gamma * update`, and the same after `LN(.) * (1 + scale) + shift`.

    LN is that of `normalize_modulate`, on the sum as it is stored.

    Args:
        rows, update: `[R, K, C]`; the update of the attention branch is in rows' dtype or, under autocast, lower.
        gamma, scale, shift: `[R, 1, C]`: the gate of the branch that ends, scale and shift of the one that begins.

    Raises:
        ValueError: shapes that do not fit.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_rows(rows, update, gamma, scale, shift)
    backend_of("add_normalize", rows, ("reference",))
    return reference.add_normalize(rows, update, gamma, scale, shift)


def add_normalize_route(
    rows: torch.Tensor,
    update: torch.Tensor,
    gamma: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    active: int,
) -> Routed:
    """`add_normalize`, then `route_experts` on the result.

    Args:
        rows, update, gamma, scale, shift: as in `add_normalize`.
        weight, bias, active: as in `route_experts`.

    Raises:
        ValueError: shapes that do not fit, or `active` out of range.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    _expect_rows(rows, update, gamma, scale, shift)
    expect_shape("weight", weight, (None, rows.shape[2]))
    expect_shape("bias", bias, (weight.shape[0],))
    expect_count("active", active, weight.shape[0])
    backend_of("add_normalize_route", rows, ("reference",))
    return Routed(*reference.add_normalize_route(rows, update, gamma, scale, shift, weight, bias, active))


def _expect_rows(rows, update, gamma, scale, shift) -> None:
    expect_shape("rows", rows, (None, None, None))
    R, K, C = rows.shape
    expect_shape("update", update, (R, K, C))
    for name, tensor in (("gamma", gamma), ("scale", scale), ("shift", shift)):
        expect_shape(name, tensor, (R, 1, C))
