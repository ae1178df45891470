"""The router in one Triton launch, and the part of it that other kernels call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from actvar_kernels.tiles import route_tiles
from actvar_kernels.token_select.triton_kernel import descending_key

_LOWEST = tl.constexpr(-(2**31))


def route_experts(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mask and logits as `reference.route_experts` does."""
    C, experts = u.shape[-1], weight.shape[0]
    mask = u.new_empty(*u.shape[:-1], experts, dtype=torch.bool)
    logits = u.new_empty(mask.shape, dtype=torch.float32)
    u = u.reshape(-1, C).contiguous()
    tokens = u.shape[0]
    tiles = route_tiles(tokens, C)
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
        num_warps=tiles.warps,
        enable_fp_fusion=True,
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
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    inside = (token < tokens)[:, None] & (channel < C)[None, :]
    u = tl.load(u_ptr + token[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    route(u, weight_ptr, bias_ptr, mask_ptr, logits_ptr, token, token < tokens, active, EXPERTS, C, BLOCK_C)


@triton.jit
def route(
    u,
    weight_ptr,
    bias_ptr,
    mask_ptr,
    logits_ptr,
    token,
    written,
    active,
    EXPERTS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Logits of the rows `u` `[ROWS, BLOCK_C]` float32, 0 outside C, each summed in the same order, one after the
    other; and the `active` experts of each, by counting those that go before."""
    BLOCK_N: tl.constexpr = triton.next_power_of_2(EXPERTS)
    channel = tl.arange(0, BLOCK_C)
    expert = tl.arange(0, BLOCK_N)
    logits = tl.zeros((u.shape[0], BLOCK_N), tl.float32)
    for e in range(0, EXPERTS):
        weight = tl.load(weight_ptr + e * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        product = tl.sum(u * weight[None, :], axis=1)  # [ROWS]
        logits += tl.where(expert[None, :] == e, product[:, None], 0.0)
    logits += tl.load(bias_ptr + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)[None, :]

    key = tl.where(expert[None, :] < EXPERTS, descending_key(logits), _LOWEST)
    mine, other = key[:, :, None], key[:, None, :]
    before = (other > mine) | ((other == mine) & (expert[None, None, :] < expert[None, :, None]))
    chosen = tl.sum(before.to(tl.int32), axis=2) < active
    target = token[:, None] * EXPERTS + expert[None, :]
    written = written[:, None] & (expert[None, :] < EXPERTS)
    tl.store(logits_ptr + target, logits, mask=written)
    tl.store(mask_ptr + target, chosen, mask=written)
