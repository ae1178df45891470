"""Rates of every block and scale that lose the least under a budget of FLOPs."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from actvar.calibrate.curves import Curves
from actvar.config import ActVARConfig, share_of
from actvar.families import family_of
from actvar.flops import block_flops
from actvar.schedule import Scale, build_schedule

TOKEN_RATES = tuple(sixteenths / 16 for sixteenths in range(8, 17))
LEAST_FFN_RATE = 0.25
BISECTIONS = 40


def rates_under_budget(var: nn.Module, config: ActVARConfig, curves: list[dict[int, Curves]]) -> ActVARConfig:
    """`config` with rates per block and scale: the least sum of relative errors (`Curves.relative_error`, by tokens) at
    no more FLOPs than `config` has.

    Every choice minimises `error + price * FLOPs`; the price is found by bisection.

    Args:
        curves: per block, by scale index.

    Raises:
        ValueError: a budget below the least rates that are tried.
    """
    budget = blocks_flops(var, config)
    least = replace(config, token_rates=(TOKEN_RATES[0],) * len(config.scales), ffn_rate=LEAST_FFN_RATE)
    if blocks_flops(var, least) > budget:
        raise ValueError(
            f"rates: expected a budget of at least token rates {TOKEN_RATES[0]} and an FFN rate of {LEAST_FFN_RATE}, got "
            f"{config.token_rates} and {config.ffn_rate}; lower rates are possible where all blocks have the same"
        )
    low, high = 0.0, 1.0
    while blocks_flops(var, _priced(var, config, curves, high)) > budget:
        low, high = high, high * 2
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        if blocks_flops(var, _priced(var, config, curves, price)) > budget:
            low = price
        else:
            high = price
    return _priced(var, config, curves, high)


def blocks_flops(var: nn.Module, config: ActVARConfig) -> int:
    """FLOPs of one row in all blocks and scales."""
    family = family_of(var)
    return sum(
        sum(block_flops(scale, config, family.width(var), family.hidden_size(var)).values())
        for block in range(len(var.blocks))
        for scale in build_schedule(config, var.patch_nums, block)
    )


def _priced(var: nn.Module, config: ActVARConfig, curves: list[dict[int, Curves]], price: float) -> ActVARConfig:
    """Rates that minimise `error + price * FLOPs`, these as a share of the dense scale's in the same block."""
    family, count = family_of(var), len(var.patch_nums)
    dense = build_schedule(replace(config, token_rates=(1.0,) * len(config.scales), ffn_rate=1.0), var.patch_nums)

    def flops(scale: Scale) -> int:
        return sum(block_flops(scale, config, family.width(var), family.hidden_size(var)).values())

    def best(of_scale: Scale, of_block: Curves) -> tuple[float, float]:
        options = []
        for token_rate in TOKEN_RATES:
            keep = share_of(token_rate, of_scale.tokens)
            for experts in range(share_of(LEAST_FFN_RATE, config.num_experts), config.num_experts + 1):
                sparse = replace(
                    of_scale,
                    keep=keep,
                    experts=experts,
                    select=keep < of_scale.tokens,
                    route=experts < config.num_experts,
                )
                error = of_block.relative_error(keep, experts) * of_scale.tokens
                options.append((error + price * flops(sparse) / all_flops, keep / of_scale.tokens, experts))
        _, token_rate, experts = min(options)
        return token_rate, experts / config.num_experts

    all_flops = sum(flops(scale) for scale in dense)
    token_rates, ffn_rates = [], []
    for index in (scale % count for scale in config.scales):
        rates = [best(dense[index], of_block[index]) for of_block in curves]
        token_rates.append(tuple(token_rate for token_rate, _ in rates))
        ffn_rates.append(tuple(ffn_rate for _, ffn_rate in rates))
    return replace(config, token_rates=tuple(token_rates), ffn_rate=tuple(ffn_rates))
