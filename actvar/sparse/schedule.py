"""The static plan of a patched model: how many tokens and experts are active at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actvar.config import ActVARConfig, share_of


@dataclass(frozen=True)
class Scale:
    """One scale of the schedule.

    Args:
        index: position in `patch_nums`.
        tokens: tokens of the scale `L`.
        start: position of its first token in the whole sequence.
        keep: tokens a block updates, K; `tokens` where nothing is selected.
        experts: experts on per token, M.
        select: whether tokens are selected, i.e. the selector runs.
        route: whether the FFN runs as experts, i.e. the router runs.
        cached_before: rows in every block's K/V cache when the scale begins.
        is_last: nothing attends to this scale's keys and values later.
    """

    index: int
    tokens: int
    start: int
    keep: int
    experts: int
    select: bool
    route: bool
    cached_before: int
    is_last: bool

    @property
    def active(self) -> bool:
        return self.select or self.route


def build_schedule(config: ActVARConfig, patch_nums: Sequence[int], block: int = 0) -> tuple[Scale, ...]:
    """One `Scale` per entry of `patch_nums`, as block number `block` has it.

    Raises:
        ValueError: a scale outside the model, or named twice.
    """
    count = len(patch_nums)
    rates: dict[int, tuple[float, float]] = {}
    for scale, token_rate, ffn_rate in zip(config.scales, config.token_rates, config.ffn_rates, strict=True):
        if not -count <= scale < count:
            raise ValueError(f"scales: the model has {count} scales, got index {scale}")
        if scale % count in rates:
            raise ValueError(f"scales: scale {scale % count} is named twice in {config.scales}")
        rates[scale % count] = tuple(
            rate[block] if isinstance(rate, tuple) else rate for rate in (token_rate, ffn_rate)
        )

    schedule, start, cached = [], 0, 0
    for index, side in enumerate(patch_nums):
        tokens = side * side
        token_rate, ffn_rate = rates.get(index, (1.0, 1.0))
        keep, experts = share_of(token_rate, tokens), share_of(ffn_rate, config.num_experts)
        forced = config.always_sparse and index in rates
        scale = Scale(
            index=index,
            tokens=tokens,
            start=start,
            keep=keep,
            experts=experts,
            select=forced or keep < tokens,
            route=forced or experts < config.num_experts,
            cached_before=cached,
            is_last=index == count - 1,
        )
        schedule.append(scale)
        start += tokens
        cached += keep if config.kv == "compact" else tokens
    return tuple(schedule)
