"""Run the router in one Triton launch."""

# A launch takes options that the kernel does not name.
# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.triton_backend.early_launch import begin, early_launch
from actvar_kernels.triton_backend.rows import route
from actvar_kernels.triton_backend.tiles import architecture, route_tiles


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mask and logits as `reference.route_experts` does."""
    C, experts = u.shape[-1], weight.shape[0]
    mask = u.new_empty(*u.shape[:-1], experts, dtype=torch.bool)
    logits = u.new_empty(mask.shape, dtype=torch.float32)
    u = u.reshape(-1, C).contiguous()
    tokens = u.shape[0]
    tiles = route_tiles(architecture(u), tokens, C, u.dtype)
    _route_experts[(triton.cdiv(tokens, tiles.rows),)](
        u,
        weight.contiguous(),
        bias,
        mask,
        logits,
        tokens,
        active,
        EXPERTS=experts,
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        ROWS=tiles.rows,
        SPLITS=tiles.splits,
        num_warps=tiles.warps,
        enable_fp_fusion=True,
        **early_launch(u),
    )
    return mask, logits


@triton.jit(do_not_specialize=["tokens", "active"])
def _route_experts(
    u_ptr,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    logits_ptr,
    tokens,
    active,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Route `ROWS` tokens."""
    begin(PDL)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = (token < tokens)[:, None] & (channel < C)[None, :]
    u = tl.load(u_ptr + token[:, None] * C + channel[None, :], mask=inside, other=0.0)
    route(u, weight_ptr, bias_ptr, mask_ptr, logits_ptr, token, token < tokens, active, EXPERTS, C, BLOCK_C, SPLITS)
