"""Run the operations of one sparse block in their order, as a sample does, to time and to check its launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from actvar_kernels.expert_ffn.op import expert_ffn_scatter
from actvar_kernels.linear.op import linear
from actvar_kernels.operations.inputs import BlockInputs
from actvar_kernels.residual_norm.op import add_normalize_route
from actvar_kernels.subset_attention.op import subset_attention
from actvar_kernels.token_select.op import select_tokens


def block_step(inputs: BlockInputs) -> Callable[[], torch.Tensor]:
    """Return a function that runs a block on `inputs.x` in place and returns it, `[R, L, C]`.

    The products around attention have weights of the FFN.

    Args:
        inputs: of one floating-point dtype.
    """
    gamma1, gamma2, scale1, scale2, shift1, shift2 = inputs.modulation
    fc1_weight, fc1_bias, *_ = inputs.ffn
    C, shape = inputs.shape.width, inputs.shape

    def run() -> torch.Tensor:
        x = inputs.x
        gate = inputs.selector, inputs.selector_bias
        selected = select_tokens(x, *gate, scale1, shift1, shape.keep, in_place=True)
        qkv = linear(selected.modulated, fc1_weight[: 3 * C], fc1_bias[: 3 * C])
        q, k, v = qkv.unflatten(-1, (3, -1, shape.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        attended, _, _ = subset_attention(
            q, k, v, inputs.past, inputs.head_scale, 1.0, room=inputs.room, keep_cache=False
        )
        update = linear(attended, fc1_weight[:C], fc1_bias[:C])
        router = inputs.router, inputs.router_bias, shape.active
        adaln = gamma1, scale2, shift2
        rows, u, mask, _ = add_normalize_route(x, selected.index, update, *adaln, *router, deferred=True)
        return expert_ffn_scatter(x, selected.index, rows, u, mask, shape.active, *inputs.ffn, gamma=gamma2)

    return run
