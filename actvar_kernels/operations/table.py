"""List all operations: how each is called, at which shapes, and what must come out.

The compile check, the benchmarks and `actvar verify` are made from this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from actvar_kernels.expert_ffn.op import SCHEDULES, expert_ffn, expert_ffn_scatter
from actvar_kernels.group_norm.op import add_residual, add_residual_moments, group_norm_silu
from actvar_kernels.operations import exact
from actvar_kernels.operations.inputs import BlockInputs
from actvar_kernels.operations.shapes import GUIDANCE, NORM_GROUPS, TOP_K, TOP_P
from actvar_kernels.residual_norm.op import Residual, add_normalize, add_normalize_route
from actvar_kernels.rotary.op import rotate_heads
from actvar_kernels.routing.op import route_experts
from actvar_kernels.scatter.op import scatter_rows
from actvar_kernels.subset_attention.op import subset_attention
from actvar_kernels.token_draw.op import sample_tokens
from actvar_kernels.token_select.op import normalize_modulate, select_tokens

Arguments = dict[str, Any]
Call = Callable[[], Any]


def _itself(result: Any) -> Any:
    return result


class Operation(NamedTuple):
    """Describe an operation.

    Attributes:
        call: the public function.
        arguments: gives keyword arguments of calls by a label, which is empty for the plain call. It takes
            `BlockInputs`, or what `SAMPLING` and `DECODER` say.
        values: takes from a result what can be compared as numbers.
        exact: says what a result must be, see `actvar_kernels.operations.exact`; None where no block is verified by it.
    """

    call: Callable[..., object]
    arguments: Callable[..., dict[str, Arguments]]
    values: Callable[..., torch.Tensor] = _itself
    exact: Callable[..., Callable[..., exact.Parts]] | None = None

    @property
    def name(self) -> str:
        """Return the name of the public function."""
        return self.call.__name__

    def calls(self, *inputs: object) -> dict[str, Call]:
        """Return a call for each label behind the operation's name; it returns the values of the result."""

        def made(arguments: Arguments) -> Call:
            return lambda: self.values(self.call(**arguments))

        found = self.arguments(*inputs)
        return {f"{self.name} {label}".strip(): made(arguments) for label, arguments in found.items()}


def _select_tokens(inputs: BlockInputs) -> dict[str, Arguments]:
    _, _, scale, _, shift, _ = inputs.modulation
    gate = dict(weight=inputs.selector, bias=inputs.selector_bias)
    plain = dict(x=inputs.x, **gate, scale=scale, shift=shift, keep=inputs.shape.keep)
    return {"": plain, "in place": plain | dict(in_place=True)}


def _normalize_modulate(inputs: BlockInputs) -> dict[str, Arguments]:
    _, _, scale, _, shift, _ = inputs.modulation
    plain = dict(x=inputs.rows, scale=scale, shift=shift)
    return {"": plain, "with guidance": plain | dict(guidance=GUIDANCE)}


def _rotate_heads(inputs: BlockInputs) -> dict[str, Arguments]:
    q = inputs.heads[0]
    angles = q.new_full((2, inputs.shape.tokens, q.shape[-1] // 2), 0.5**0.5)
    return {"": dict(x=q, angles=angles, index=inputs.index, scale=inputs.head_scale)}


def _subset_attention(inputs: BlockInputs) -> dict[str, Arguments]:
    q, k, v = inputs.heads
    shape = inputs.shape
    visible = q.new_zeros(shape.rows, 1, shape.keep, shape.cached + shape.keep)
    common = dict(q=q, k=k, v=v, past=inputs.past, head_scale=inputs.head_scale, softmax_scale=1.0)
    return {
        "": common | dict(keep_cache=False),
        "without QK norm": common | dict(head_scale=None, softmax_scale=HEAD_SCALE),
        "with mask": common | dict(mask=visible),
        "with room": common | dict(room=inputs.room),
        "of the first scale": common | dict(past=None),
    }


HEAD_SCALE = 0.03
"""Scale of the softmax of a model without QK norm."""


def _residual(inputs: BlockInputs) -> Arguments:
    gamma, _, _, scale, _, shift = inputs.modulation
    return dict(x=inputs.x, index=inputs.index, update=inputs.update, gamma=gamma, scale=scale, shift=shift)


def _add_normalize(inputs: BlockInputs) -> dict[str, Arguments]:
    return {"": _residual(inputs) | dict(x=inputs.rows, index=None)}


def _router(inputs: BlockInputs) -> Arguments:
    return dict(weight=inputs.router, bias=inputs.router_bias, active=inputs.shape.active)


def _add_normalize_route(inputs: BlockInputs) -> dict[str, Arguments]:
    plain = _residual(inputs) | _router(inputs)
    return {
        "": plain,
        "of all tokens": plain | dict(x=inputs.rows, index=None),
        "of a fused residual": plain | dict(deferred=True),
    }


def _route_experts(inputs: BlockInputs) -> dict[str, Arguments]:
    return {"": dict(u=inputs.u, **_router(inputs))}


def _ffn(inputs: BlockInputs) -> Arguments:
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    weights = dict(zip(names, inputs.ffn, strict=True))
    return dict(u=inputs.u, mask=inputs.mask, active=inputs.shape.active, **weights)


def _expert_ffn(inputs: BlockInputs) -> dict[str, Arguments]:
    return {"": _ffn(inputs)}


def expert_ffn_scatter_arguments(inputs: BlockInputs) -> dict[str, Arguments]:
    """Return the arguments of `expert_ffn_scatter` by schedule, for rows and for residuals that are fused into it."""
    gamma1, gamma2 = inputs.modulation[:2]
    plain = dict(rest=inputs.base, index=inputs.index, rows=inputs.rows, gamma=gamma2, **_ffn(inputs))
    residual = Residual(inputs.x, inputs.update, gamma1)
    found = {}
    for schedule in SCHEDULES:
        found[schedule] = plain | dict(schedule=schedule)
        fused = dict(rest=inputs.x, rows=residual, schedule=schedule)
        found[f"{schedule} of a fused residual"] = plain | fused
    return found | {"of all tokens": plain | dict(rest=None, index=None)}


def _scatter_rows(inputs: BlockInputs) -> dict[str, Arguments]:
    gamma = inputs.modulation[1]
    return {"": dict(rest=inputs.base, index=inputs.index, rows=inputs.rows, update=inputs.update, gamma=gamma)}


def _sample_tokens(logits: torch.Tensor, seed: torch.Tensor, noise: torch.Tensor) -> dict[str, Arguments]:
    plain = dict(logits=logits, guidance=GUIDANCE, top_k=TOP_K, top_p=TOP_P, seed=seed)
    return {
        "": plain,
        "of guided logits": plain | dict(guidance=None),
        "with a number as seed": plain | dict(top_p=0.0, seed=0),
        "with noise": plain | dict(top_k=0, top_p=0.0, seed=None, noise=noise),
        "with a seed for each image": plain | dict(seed=seed.repeat(len(noise))),
    }


def _group_norm_silu(x: torch.Tensor, vector: torch.Tensor) -> dict[str, Arguments]:
    channels = f"of {len(vector)} channels"
    plain = dict(x=x, weight=vector, bias=vector, groups=NORM_GROUPS, eps=1e-6)
    return {
        channels: plain,
        f"{channels} with offset": plain | dict(offset=vector),
        f"{channels} without SiLU": plain | dict(silu=False),
    }


def _add_residual(x: torch.Tensor, vector: torch.Tensor) -> dict[str, Arguments]:
    return {f"of {len(vector)} channels": dict(x=x, update=x, bias=vector)}


BLOCK = (
    Operation(select_tokens, _select_tokens, lambda result: result.scores, exact.select_tokens),
    Operation(normalize_modulate, _normalize_modulate, exact=exact.normalize_modulate),
    Operation(rotate_heads, _rotate_heads, exact=exact.rotate_heads),
    Operation(subset_attention, _subset_attention, lambda result: result[0], exact.subset_attention),
    Operation(add_normalize, _add_normalize, lambda result: result[1], exact.add_normalize),
    Operation(add_normalize_route, _add_normalize_route, lambda result: result.u, exact.add_normalize_route),
    Operation(route_experts, _route_experts, lambda result: result[1], exact.route_experts),
    Operation(expert_ffn, _expert_ffn),
    Operation(expert_ffn_scatter, expert_ffn_scatter_arguments, exact=exact.expert_ffn_scatter),
    Operation(scatter_rows, _scatter_rows, exact=exact.scatter_rows),
)
"""Operations of a block, in its order; they take `BlockInputs`."""
SAMPLING = (Operation(sample_tokens, _sample_tokens),)
"""They take logits `[2B, L, V]`, a seed `[1]` and noise `[B, L, V]`."""
DECODER = (
    Operation(group_norm_silu, _group_norm_silu),
    Operation(add_residual, _add_residual),
    Operation(add_residual_moments, _add_residual, lambda result: result[0]),
)
"""They take images `[B, C, H, W]` and a vector `[C]`."""
