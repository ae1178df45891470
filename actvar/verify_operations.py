"""What the operations of a block must give, in float64, for the arguments of one call; read by `actvar.verify`.

Choices are judged by the scores they were made from: a result's kept tokens must be the highest of the result's own
scores, and its values must belong to those tokens. So rounding that swaps two nearly equal scores is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

import actvar_kernels
from actvar_kernels.residual_norm.reference import Residual
from actvar_kernels.token_select.reference import NORM_EPS, gather_rows, top_indices

# What a result holds: its name, its value, and the value that is due: within a tolerance where that is in float64,
# otherwise bit for bit.
Parts = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


def wide(value):
    """`value` with its floating-point tensors in float64; `value` may be a tuple or dict of tensors and others."""
    if isinstance(value, dict):
        return {name: wide(item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [wide(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def select_tokens(x, weight, bias, scale, shift, keep, share_guidance, in_place) -> Callable[..., Parts]:
    normalized = F.layer_norm(x.double(), x.shape[-1:], eps=NORM_EPS)
    scores = (normalized * weight.double()).sum(dim=-1) + bias.double()

    def parts(result) -> Parts:
        yield "scores", result.scores, scores
        deciding = result.scores.chunk(2)[0] if share_guidance else result.scores
        index = top_indices(deciding, keep).repeat(2 if share_guidance else 1, 1)
        left = _left_alone(index, x)
        yield "index", result.index, index
        modulated = actvar_kernels.normalize_modulate(gather_rows(x, index).double(), scale.double(), shift.double())
        yield "modulated rows", result.modulated, modulated
        yield "rest", result.rest[left], x[left]

    return parts


def normalize_modulate(**arguments) -> Callable[..., Parts]:
    exact = actvar_kernels.normalize_modulate(**wide(arguments))
    return lambda result: iter([("output", result, exact)])


def subset_attention(**arguments) -> Callable[..., Parts]:
    exact = actvar_kernels.subset_attention(**wide(arguments))

    def parts(result) -> Parts:
        for name, value, due in zip(("output", "keys", "values"), result, exact, strict=True):
            if due is not None:
                yield name, value, due

    return parts


def add_normalize(x, index, update, gamma, scale, shift) -> Callable[..., Parts]:
    rows = x if index is None else gather_rows(x, index)
    exact = rows.double() + gamma.double() * update.double()

    def parts(result) -> Parts:
        rows = result[0]
        if isinstance(rows, Residual):
            rows = rows.rows(index)
        else:
            yield "rows", rows, exact
        # of the sum as it is stored
        u = actvar_kernels.normalize_modulate(rows.double(), scale.double(), shift.double())
        yield "normalised rows", result[1], u

    return parts


def add_normalize_route(x, index, update, gamma, scale, shift, weight, bias, active, deferred) -> Callable[..., Parts]:
    before_routing = add_normalize(x, index, update, gamma, scale, shift)

    def parts(result) -> Parts:
        yield from before_routing(result)
        yield "logits", result.logits, F.linear(result.u.double(), weight.double(), bias.double())
        chosen = top_indices(result.logits, active)
        yield "experts", result.mask, torch.zeros_like(result.mask).scatter(-1, chosen, True)

    return parts


def expert_ffn_scatter(**arguments) -> Callable[..., Parts]:
    rows, index = arguments["rows"], arguments["index"]
    if isinstance(rows, Residual):  # as it would be stored
        arguments = arguments | {"rows": rows.rows(index)}
    return _scattered(actvar_kernels.expert_ffn_scatter(**wide(arguments)), arguments)


def scatter_rows(**arguments) -> Callable[..., Parts]:
    return _scattered(actvar_kernels.scatter_rows(**wide(arguments)), arguments)


def _scattered(exact: torch.Tensor, arguments: dict) -> Callable[..., Parts]:
    index, rest = arguments["index"], arguments["rest"]

    def parts(result) -> Parts:
        yield "output", result, exact
        if index is not None:
            left = _left_alone(index, rest)
            yield "rows left alone", result[left], exact[left].to(rest.dtype)

    return parts


def _left_alone(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mask `[R, L]` of the rows of `x` `[R, L, C]` that `index` `[R, K]` leaves out."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, index, False)


# By their name in `actvar.block`: called with the arguments of a call, each gives the function that takes its result
# apart.
OPERATIONS: dict[str, Callable[..., Callable[..., Parts]]] = {
    function.__name__: function
    for function in (
        select_tokens,
        normalize_modulate,
        subset_attention,
        add_normalize,
        add_normalize_route,
        expert_ffn_scatter,
        scatter_rows,
    )
}
# Arguments that an operation may write to.
WRITABLE = ("rest", "room")
