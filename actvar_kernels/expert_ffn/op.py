"""The FFN as experts: hidden units cut into equal groups, of which each token uses a few."""

from __future__ import annotations

import torch

from actvar_kernels.backend import backend_of
from actvar_kernels.checks import expect_count, expect_shape
from actvar_kernels.expert_ffn import reference
from actvar_kernels.scatter.op import scatter_rows

SCHEDULES = ("auto", "dense", "tile_list", "snap")


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `active` experts with the highest logits for each token, ties to the lower index.

    Args:
        u: FFN input, `[..., C]`.
        weight, bias: the router, `[N, C]` and `[N]`; logits are in float32 and outside autocast.
        active: experts per token, 1 ... N.

    Returns:
        mask `[..., N]` bool, logits `[..., N]` float32.

    Raises:
        ValueError: shapes that do not fit, or `active` out of range.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_shape("weight", weight, (None, u.shape[-1]))
    expect_shape("bias", bias, (weight.shape[0],))
    expect_count("active", active, weight.shape[0])
    backend_of("route_experts", u, ("reference",))
    return reference.route_experts(u, weight, bias, active)


def expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs (Eq. 4): `fc2_bias + sum_e mask_e gelu_tanh(u W1_e^T + b1_e) W2_e^T`.

    Expert e owns the e-th of N equal groups of the D hidden units. With every expert on it is the dense FFN.

    Args:
        u: `[..., C]`.
        mask: `[..., N]`: bool, or float gates that multiply the experts' outputs (training).
        active: experts that are on per token; what the FLOP count of a call is based on.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[D, C]`, `[D]`, `[C, D]`, `[C]`.

    Raises:
        ValueError: shapes that do not fit, or N that does not divide D.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    D, C = fc1_weight.shape
    expect_shape("u", u, (*u.shape[:-1], C))
    expect_shape("fc1_bias", fc1_bias, (D,))
    expect_shape("fc2_weight", fc2_weight, (C, D))
    expect_shape("fc2_bias", fc2_bias, (C,))
    expect_shape("mask", mask, (*u.shape[:-1], None))
    if D % mask.shape[-1]:
        raise ValueError(f"mask: the number of experts must divide the hidden size {D}, got {mask.shape[-1]} experts")
    expect_count("active", active, mask.shape[-1])
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, mask, *weights)):
        return reference.expert_ffn(u, mask, *weights)
    if torch.compiler.is_compiling() and torch.is_autocast_enabled(u.device.type):
        dtype = torch.get_autocast_dtype(u.device.type)  # the compiler does not look into the operator
        u, weights = u.to(dtype), [w.to(dtype) for w in weights]
    return torch.ops.actvar_kernels.expert_ffn(u, mask, active, *weights)


def expert_ffn_scatter(
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    gamma: torch.Tensor,
    schedule: str = "auto",
) -> torch.Tensor:
    """`expert_ffn` with its residual: `rest` with `rest[r, index[r, j]] = rows[r, j] + gamma[r] * expert_ffn(u)[r, j]`.

    Args:
        rest, index: as in `scatter_rows`; both None when every row was kept: the result is `[R, K, C]`.
        rows: the kept rows before the FFN, `[R, K, C]`.
        u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias: as in `expert_ffn`, `[R, K, ...]`.
        gamma: AdaLN gate of the branch, `[R, 1, C]`.
        schedule: one of `SCHEDULES`, for the Triton backend. `"dense"` runs every expert and masks, `"tile_list"` skips
            experts that no row of a tile wants, `"auto"` takes the measured faster of the two: equal results.
            `"snap"` changes them: tokens are sorted by their experts, and every tile of 128 runs the `active` experts
            that most of its rows want (`reference.snapped`).

    Raises:
        ValueError: shapes that do not fit, N that does not divide D, an unknown schedule.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    expect_shape("rows", rows, tuple(u.shape))
    expect_shape("gamma", gamma, (u.shape[0], 1, u.shape[-1]))
    if schedule == "snap":
        mask = reference.snapped(mask, active)
    update = expert_ffn(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if index is None:
        return rows + gamma * update
    return scatter_rows(rest, index, rows, update, gamma)


@torch.library.custom_op("actvar_kernels::expert_ffn", mutates_args=())
def _expert_ffn(
    u: torch.Tensor,
    mask: torch.Tensor,
    active: int,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
) -> torch.Tensor:
    backend_of("expert_ffn", u, ("reference",))
    return reference.expert_ffn(u, mask, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


@_expert_ffn.register_fake
def _(u, mask, active, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    device = u.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else u.dtype
    return u.new_empty(u.shape, dtype=dtype)


def expert_ffn_flops(u_shape, mask_shape, active, fc1_shape, *_shapes, **_kwargs) -> int:
    """FLOPs of one `expert_ffn` call, 2 a multiply-add: only the chosen experts' rows and columns count."""
    tokens = 1
    for size in u_shape[:-1]:
        tokens *= size
    D, C = fc1_shape
    return 2 * 2 * tokens * C * (D // mask_shape[-1]) * active
