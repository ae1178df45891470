"""Choose experts by the router's logits."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels.backend import Backend, choose, in_kernel_dtypes
from actvar_kernels.checks import expect_count, expect_one_device, expect_shape, expect_tensor
from actvar_kernels.constants import MAX_EXPERTS
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.gradients import register_reference_gradient
from actvar_kernels.routing import reference


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `active` experts with the highest logits for each token, ties to the lower index.

    Triton takes one launch, for N up to 32.

    Args:
        u: `[..., C]`, floating-point, the input of the FFN.
        weight, bias: the router, `[N, C]` and `[N]`, floating-point; logits are in float32 and outside autocast.
        active: experts per token, 1 ... N.

    Returns:
        mask `[..., N]` bool, logits `[..., N]` float32.

    Raises:
        ValueError: shapes or devices that do not fit, or `active` out of range.
        BackendUnavailableError: see `actvar_kernels.set_backend`.
    """
    expect_tensor("u", u)
    expect_shape("weight", weight, (None, u.shape[-1]))
    expect_shape("bias", bias, (weight.shape[0],))
    active = expect_count("active", active, weight.shape[0])
    expect_one_device(u, weight, bias)
    backend = _choose(u, weight, bias)
    if backend.calls_operator:
        logits, mask = torch.ops.actvar_kernels.route_experts(u, weight, bias, active)
        return mask, logits
    return _run(backend, u, weight, bias, active)


def _choose(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Backend:
    """Return the backend of a call with these arguments."""
    return choose(
        "route_experts",
        u,
        weight,
        bias,
        takes_triton=lambda: weight.shape[0] <= MAX_EXPERTS and in_kernel_dtypes(u, weight, bias),
        limits=f"float32, float16 and bfloat16, up to {MAX_EXPERTS} experts",
        why_not_in_cpp=lambda: cpu.why_not(u, weight, bias),
    )


def _run(backend: Backend, u, weight, bias, active) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the operation on a backend."""
    if backend.name == "cpu":
        return row_ops.route_experts(u, weight, bias, active)
    if backend.name == "reference":
        return reference.route_experts(u, weight, bias, active)
    from actvar_kernels.routing import triton_kernel

    return triton_kernel.route_experts(u, weight, bias, active)


@torch.library.custom_op("actvar_kernels::route_experts", mutates_args=())
def _route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, logits = _run(_choose(u, weight, bias), u, weight, bias, active)
    return logits, mask


@_route_experts.register_fake
def _(u, weight, bias, active):
    mask = u.new_empty(*u.shape[:-1], weight.shape[0], dtype=torch.bool)
    return torch.empty_like(mask, dtype=torch.float32), mask


def _logits_first(u, weight, bias, active) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the operator does, by the reference."""
    mask, logits = reference.route_experts(u, weight, bias, active)
    return logits, mask


register_reference_gradient(_route_experts, _logits_first)


def route_experts_flops(u_shape, weight_shape, *_args, **_kwargs) -> int:
    """Return the FLOPs of one `route_experts` operator, 2 a multiply-add."""
    return 2 * math.prod(u_shape) * weight_shape[0]


register_flop_formula(torch.ops.actvar_kernels.route_experts)(route_experts_flops)
