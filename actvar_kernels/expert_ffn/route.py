"""The backends of `route_experts` and its operator."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from actvar_kernels import cpu, cpu_rows
from actvar_kernels.backend import backend_of, kernel_backends, needs_operator
from actvar_kernels.expert_ffn import reference
from actvar_kernels.gradients import register_reference_gradient

MAX_EXPERTS = 32
"""Experts that the Triton kernels rank."""


def route(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_experts` with arguments that fit."""
    backend = _backend(u, weight, bias)
    if backend != "reference" and needs_operator(u, weight, bias):
        logits, mask = torch.ops.actvar_kernels.route_experts(u, weight, bias, active)
        return mask, logits
    return _run(backend, u, weight, bias, active)


def _backend(u, weight, bias) -> str:
    supported = kernel_backends(u, weight, bias, fits=weight.shape[0] <= MAX_EXPERTS)
    return backend_of(
        "route_experts",
        u,
        weight,
        bias,
        supported=supported,
        limits=f"float32, float16 and bfloat16, up to {MAX_EXPERTS} experts",
        why_not_in_cpp=lambda: cpu.why_not(u, weight, bias),
    )


def _run(backend, u, weight, bias, active) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "cpu":
        return cpu_rows.route_experts(u, weight, bias, active)
    if backend == "reference":
        return reference.route_experts(u, weight, bias, active)
    from actvar_kernels.residual_norm import triton_kernel

    return triton_kernel.route_experts(u, weight, bias, active)


@torch.library.custom_op("actvar_kernels::route_experts", mutates_args=())
def _route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, logits = _run(_backend(u, weight, bias), u, weight, bias, active)
    return logits, mask


@_route_experts.register_fake
def _(u, weight, bias, active):
    mask = u.new_empty(*u.shape[:-1], weight.shape[0], dtype=torch.bool)
    return torch.empty_like(mask, dtype=torch.float32), mask


def _logits_first(u, weight, bias, active) -> tuple[torch.Tensor, torch.Tensor]:
    mask, logits = reference.route_experts(u, weight, bias, active)
    return logits, mask


register_reference_gradient(_route_experts, _logits_first)


def route_experts_flops(u_shape, weight_shape, *_args, **_kwargs) -> int:
    """FLOPs of one `route_experts` operator, 2 a multiply-add."""
    return 2 * math.prod(u_shape) * weight_shape[0]


register_flop_formula(torch.ops.actvar_kernels.route_experts)(route_experts_flops)
