"""Rates of every block that lose the least under a budget of FLOPs, scale by scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from actvar.calibrate.curves import Curves
from actvar.calibrate.sensitivity import FFN_RATE, TOKEN_RATE
from actvar.config import ActVARConfig, share_of
from actvar.families import family_of
from actvar.families.conditions import Conditions, text_tokens
from actvar.flops import block_flops
from actvar.sparse.schedule import Scale, build_schedule

TOKEN_RATES = tuple(sixteenths / 16 for sixteenths in range(8, 17))
LEAST_FFN_RATE = 0.25
BISECTIONS = 40


Budget = tuple[int, int]
"""Tokens and experts that are kept."""


def rates_under_budget(
    var: nn.Module,
    config: ActVARConfig,
    conditions: Conditions,
    curves: list[dict[int, Curves]],
    sensitivity: list[dict[int, tuple[float, float]]],
) -> ActVARConfig:
    """Return `config` with the rates per block that lose the least.

    No scale takes more FLOPs than under `config`. The divergences of blocks are added up, each in proportion to the
    energy that is lost in it. A block that keeps K tokens and M experts has the divergence
    `d_tokens * lost(K) / lost(K of the probe) + K / L * d_experts * lost(M) / lost(M of the probe)`. Every choice
    minimises `divergence + price * FLOPs`; the price of a scale is found by bisection.

    Args:
        var: the model.
        config: with one rate per scale.
        conditions: of the images whose FLOPs count.
        curves: per block, by scale index.
        sensitivity: per block, by scale index, see `divergence_per_block`.
    """
    token_rates, ffn_rates = [], []
    for index, options, budget in _choices(var, config, conditions):
        losses = [
            block_losses(block_curves[index], *divergences[index])
            for block_curves, divergences in zip(curves, sensitivity, strict=True)
        ]
        chosen = _cheapest(losses, options, budget * len(losses))
        height, width = family_of(var).maps_of(var, conditions)[index]
        tokens = height * width
        token_rates.append(tuple(keep / tokens for keep, _ in chosen))
        ffn_rates.append(tuple(experts / config.num_experts for _, experts in chosen))
    return replace(config, token_rates=tuple(token_rates), ffn_rate=tuple(ffn_rates))


def expect_budget(var: nn.Module, config: ActVARConfig, conditions: Conditions) -> None:
    """Check that the budget of `config`, for images of `conditions`, is enough for the least rates that are tried.

    Raises:
        ValueError: the rates of `config` take fewer FLOPs.
    """
    for _, options, budget in _choices(var, config, conditions):
        if min(options.values()) > budget:
            raise ValueError(
                f"rates: {config.token_rates} and {config.ffn_rate} are less than the least that is tried in a block, "
                f"{TOKEN_RATES[0]} of the tokens and {LEAST_FFN_RATE} of the experts; ask for uniform rates"
            )


def _choices(
    var: nn.Module, config: ActVARConfig, conditions: Conditions
) -> Iterator[tuple[int, dict[Budget, int], int]]:
    """Yield the index of each active scale, a block's FLOPs by its choice, and the block's share of the budget.

    FLOPs are counted as if the K/V cache held all tokens of earlier scales, which is an upper bound.
    """
    family, N = family_of(var), config.num_experts
    maps, sizes, text = family.maps_of(var, conditions), family.sizes(var), text_tokens(conditions)

    def flops(scale: Scale) -> int:
        return sum(block_flops(scale, config, sizes.width, sizes.hidden, text).values())

    dense = build_schedule(config.without_savings(), maps)
    budget_schedule = build_schedule(config, maps)
    for scale in (dense[index] for index in config.scales):
        options = {
            (keep, experts): flops(
                replace(scale, keep=keep, experts=experts, select=keep < scale.tokens, route=experts < N)
            )
            for keep in sorted({share_of(rate, scale.tokens) for rate in TOKEN_RATES})
            for experts in range(share_of(LEAST_FFN_RATE, N), N + 1)
        }
        yield scale.index, options, flops(budget_schedule[scale.index])


def blocks_flops(var: nn.Module, config: ActVARConfig, conditions: Conditions) -> int:
    """Return the FLOPs of one row in all blocks and scales, for images of `conditions`."""
    family = family_of(var)
    sizes, maps, text = family.sizes(var), family.maps_of(var, conditions), text_tokens(conditions)
    return sum(
        sum(block_flops(scale, config, sizes.width, sizes.hidden, text).values())
        for block in range(len(family.blocks(var)))
        for scale in build_schedule(config, maps, block)
    )


def block_losses(
    curves: Curves, token_divergence: float, expert_divergence: float, static: bool = False
) -> dict[Budget, float]:
    """Return the divergence that one block causes, mean over the tokens of a scale, by the block's choice.

    Args:
        curves: of the block at the scale.
        token_divergence: at `TOKEN_RATE`.
        expert_divergence: at `FFN_RATE`, of the experts that a router chooses.
        static: whether the experts are those of static pruning, with as much divergence for the energy that is lost.
    """
    L, N = curves.tokens, curves.num_experts
    by_tokens = token_divergence * curves.update_lost / curves.update_lost[share_of(TOKEN_RATE, L)]
    lost = curves.static_lost if static else curves.output_lost
    by_experts = expert_divergence * lost / curves.output_lost[share_of(FFN_RATE, N)]
    return {
        (keep, experts): (by_tokens[keep] + keep / L * by_experts[experts]).item()
        for keep in {share_of(rate, L) for rate in TOKEN_RATES}
        for experts in range(share_of(LEAST_FFN_RATE, N), N + 1)
    }


def _cheapest(losses: list[dict[Budget, float]], flops: dict[Budget, int], budget: int) -> list[Budget]:
    """Return the choice of each block: the least loss at no more than `budget` FLOPs, on the convex hull."""

    def at(price: float) -> list[Budget]:
        return [min(block, key=lambda kept: block[kept] + price * flops[kept]) for block in losses]

    def fits(chosen: list[Budget]) -> bool:
        return sum(flops[kept] for kept in chosen) <= budget

    low, high = 0.0, 1.0 / budget
    while not fits(at(high)):
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        low, high = (low, price) if fits(at(price)) else (price, high)
    return at(high)
