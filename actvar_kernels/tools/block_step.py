"""Run the operations of one block in their order, as a sample does, to time and to check its launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from actvar_kernels.expert_ffn.op import expert_ffn_scatter
from actvar_kernels.linear.few_rows import MOST_CHANNELS, MOST_ROWS, linear_residual, norm_linear
from actvar_kernels.linear.op import linear
from actvar_kernels.linear.products import gelu_linear
from actvar_kernels.operations.inputs import BlockInputs
from actvar_kernels.operations.shapes import BlockShape, dense_scales
from actvar_kernels.residual_norm.op import add_normalize, add_normalize_route
from actvar_kernels.residual_norm.reference import Gated, Residual
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
        update = linear(_attended(inputs, qkv), fc1_weight[:C], fc1_bias[:C])
        router = inputs.router, inputs.router_bias, shape.active
        adaln = gamma1, scale2, shift2
        rows, u, mask, _ = add_normalize_route(x, selected.index, update, *adaln, *router, deferred=True)
        return expert_ffn_scatter(x, selected.index, rows, u, mask, shape.active, *inputs.ffn, gamma=gamma2)

    return run


def scales_of_few_rows(model: str, batch: int) -> list[BlockShape]:
    """Return the scales of a model at which a dense block can take 5 launches."""
    return [shape for shape in dense_scales(model, batch, MOST_ROWS) if shape.width <= MOST_CHANNELS]


def dense_block_step(inputs: BlockInputs, few: bool) -> Callable[[], torch.Tensor]:
    """Return a function that runs a dense block on the rows `[R, L, C]` behind `Residual(x, update, gamma2)`.

    In 7 launches it adds that residual and returns the FFN's output, whose own residual the next block adds. For `few`
    rows it takes the sum, computed before, and returns the sum behind the FFN in 5 launches.

    Args:
        inputs: of one floating-point dtype, with all tokens kept.
        few: whether to take 5 launches.
    """
    gamma1, gamma2, scale1, scale2, shift1, shift2 = inputs.modulation
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs.ffn
    C, whole = inputs.shape.width, Residual(inputs.x, inputs.update, gamma2).rows(None)
    into, out_of = (fc1_weight[: 3 * C], fc1_bias[: 3 * C]), (fc1_weight[:C], fc1_bias[:C])

    def seven() -> torch.Tensor:
        rows, u = add_normalize(inputs.x, None, inputs.update, gamma2, scale1, shift1)
        update = linear(_attended(inputs, linear(u, *into)), *out_of)
        _, u = add_normalize(rows, None, update, gamma1, scale2, shift2)
        return F.linear(gelu_linear(u.flatten(0, 1), fc1_weight, fc1_bias), fc2_weight, fc2_bias).view_as(u)

    def five() -> torch.Tensor:
        attended = _attended(inputs, norm_linear(whole, scale1, shift1, *into))
        rows = linear_residual(attended, *out_of, Gated(whole, gamma1))
        hidden = norm_linear(rows, scale2, shift2, fc1_weight, fc1_bias, with_gelu=True)
        return linear_residual(hidden, fc2_weight, fc2_bias, Gated(rows, gamma2))

    return five if few else seven


def _attended(inputs: BlockInputs, qkv: torch.Tensor) -> torch.Tensor:
    """Return attention of queries, keys and values `[R, K, 3 * C]` over those and the cached ones, `[R, K, C]`."""
    q, k, v = qkv.unflatten(-1, (3, -1, inputs.shape.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    past = inputs.past if inputs.shape.cached else None
    return subset_attention(q, k, v, past, inputs.head_scale, 1.0, room=inputs.room, keep_cache=False)[0]
