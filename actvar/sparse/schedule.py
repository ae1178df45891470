"""The static plan of a patched model: how many tokens and experts are active at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actvar.config import ActVARConfig, share_of


@dataclass(frozen=True)
class Scale:
    """One scale of the schedule.

    Args:
        index: number of the scale.
        height, width: of the token map.
        start: position of its first token in the whole sequence.
        keep: tokens a block updates, K; `tokens` where nothing is selected.
        experts: experts on per token, M.
        select: whether tokens are selected, i.e. the selector runs.
        route: whether the FFN runs as experts, i.e. the router runs.
        cached_before: rows in every block's K/V cache when the scale begins.
        is_last: nothing attends to this scale's keys and values later.
    """

    index: int
    height: int
    width: int
    start: int
    keep: int
    experts: int
    select: bool
    route: bool
    cached_before: int
    is_last: bool

    @property
    def tokens(self) -> int:
        """Return the tokens of the scale, L."""
        return self.height * self.width

    @property
    def active(self) -> bool:
        return self.select or self.route


def build_schedule(config: ActVARConfig, maps: Sequence[tuple[int, int]], block: int = 0) -> tuple[Scale, ...]:
    """Return one `Scale` per token map, for block number `block`.

    Args:
        maps: height and width of the token map of every scale.

    Raises:
        ValueError: a scale outside the model, or named twice.
    """
    count = len(maps)
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
    for index, (height, width) in enumerate(maps):
        tokens = height * width
        token_rate, ffn_rate = rates.get(index, (1.0, 1.0))
        keep, experts = share_of(token_rate, tokens), share_of(ffn_rate, config.num_experts)
        forced = config.always_sparse and index in rates
        scale = Scale(
            index=index,
            height=height,
            width=width,
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
