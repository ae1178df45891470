"""Plan how many tokens and experts of a patched model are active at each scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actvar.config import ActVARConfig, Rate, share_of


@dataclass(frozen=True)
class Scale:
    """Hold the plan of one block at one scale.

    Args:
        index: number of the scale.
        height, width: tokens along each side of the token map.
        start: position of its first token in the whole sequence.
        keep: number of tokens that the block updates, K; `tokens` where nothing is selected.
        experts: number of experts that are on per token, M.
        select: whether tokens are selected, i.e. the selector runs.
        route: whether the FFN runs as experts, i.e. the router runs.
        static: whether the FFN has its first experts alone, for every token.
        cached_before: rows in every block's K/V cache when the scale begins.
        is_last: whether the scale is the model's last, whose keys and values nothing attends to later.
        guided: whether the unconditional rows are computed.
        tuned: whether the weights that an adapter brings are used instead of the model's own.
        left_out: whether sampling ends before the scale.
    """

    index: int
    height: int
    width: int
    start: int
    keep: int
    experts: int
    select: bool
    route: bool
    static: bool
    cached_before: int
    is_last: bool
    guided: bool = True
    tuned: bool = True
    left_out: bool = False

    @property
    def tokens(self) -> int:
        """Return the number of tokens of the scale, L."""
        return self.height * self.width

    @property
    def active(self) -> bool:
        """Return whether tokens are selected, or the FFN runs as experts or without some of them."""
        return self.select or self.route or self.static


def build_schedule(config: ActVARConfig, maps: Sequence[tuple[int, int]], block: int = 0) -> tuple[Scale, ...]:
    """Return one `Scale` per token map, for block number `block`.

    Args:
        config: rates and variants.
        maps: height and width of the token map of every scale.
        block: number of the block.

    Raises:
        ValueError: the configuration names a scale outside the model, or a scale twice.
    """
    count = len(maps)
    guided, end, tuned_from = scales_with_guidance(config, count), scales_sampled(config, count), 0
    if config.weights_from is not None:
        tuned_from = _number_of("weights_from", config.weights_from, count)
    rates: dict[int, tuple[float, float]] = {}
    for scale, token_rate, ffn_rate in zip(config.scales, config.token_rates, config.ffn_rates, strict=True):
        number = _number_of("scales", scale, count)
        if number in rates:
            raise ValueError(f"scales: scale {number} is named twice in {config.scales}")
        rates[number] = (_rate_of(token_rate, block), _rate_of(ffn_rate, block))

    schedule, start, cached = [], 0, 0
    for index, (height, width) in enumerate(maps):
        tokens = height * width
        token_rate, ffn_rate = rates.get(index, (1.0, 1.0))
        keep, experts = share_of(token_rate, tokens), share_of(ffn_rate, config.num_experts)
        forced = config.always_sparse and index in rates
        thinned = forced or experts < config.num_experts
        scale = Scale(
            index=index,
            height=height,
            width=width,
            start=start,
            keep=keep,
            experts=experts,
            select=forced or keep < tokens,
            route=thinned and not config.static_experts,
            static=thinned and config.static_experts,
            cached_before=cached,
            is_last=index == count - 1,
            guided=index < guided,
            tuned=index >= tuned_from,
            left_out=index >= end,
        )
        schedule.append(scale)
        start += tokens
        cached += keep if config.kv == "compact" else tokens
    return tuple(schedule)


def numbered_scale(schedule: Sequence[Scale], number: int, tokens: int) -> Scale:
    """Return the scale with a number, which must have `tokens` tokens.

    Raises:
        ValueError: the schedule has no such scale, or the scale has another number of tokens.
    """
    if number < len(schedule) and schedule[number].tokens == tokens:
        return schedule[number]
    planned = f"{schedule[number].tokens} tokens" if number < len(schedule) else f"{len(schedule)} scales in all"
    raise ValueError(
        f"expected {planned}, as planned for scale {number}, got {tokens} tokens; sample by the model's own methods, "
        "or open model.sampling(schedule, draw) around a loop of your own, so that the patch knows the token maps"
    )


def unknown_scale(known: Iterable[tuple[int, int]], tokens: int, cached: int) -> ValueError:
    """Return the error for a call whose tokens and cached rows are those of no scale.

    Args:
        known: tokens and cached rows of every scale.
        tokens, cached: those of the call.
    """
    pairs = ", ".join(f"{count} after {before}" for count, before in known)
    return ValueError(
        f"expected the tokens of one scale with the K/V cache of the scales before it ({pairs} cached rows), "
        f"got {tokens} tokens after {cached}. Start the K/V caches, with block.attn.kv_caching(True), before "
        "the first scale, or pass attn_bias for teacher forcing."
    )


def scales_with_guidance(config: ActVARConfig, count: int) -> int:
    """Return how many of `count` scales, counted from the first, are computed with guidance.

    Raises:
        ValueError: `guidance_until` is outside the model, or leaves no scale with guidance.
    """
    if config.guidance_until is None:
        return count
    number = _number_of("guidance_until", config.guidance_until, count)
    if number == 0:
        raise ValueError("guidance_until: expected at least the first scale with guidance, got 0; sample with cfg=0")
    return number


def scales_sampled(config: ActVARConfig, count: int) -> int:
    """Return how many of `count` scales, counted from the first, are sampled.

    Raises:
        ValueError: `scales_until` is outside the model, or leaves no scale.
    """
    if config.scales_until is None:
        return count
    number = _number_of("scales_until", config.scales_until, count)
    if number == 0:
        raise ValueError("scales_until: expected at least the first scale to be sampled, got 0")
    return number


def _number_of(name: str, scale: int, count: int) -> int:
    """Return the number of a scale that may be counted from the end."""
    if not -count <= scale < count:
        raise ValueError(f"{name}: the model has {count} scales, got index {scale}")
    return scale % count


def _rate_of(rate: Rate, block: int) -> float:
    """Return the rate of block number `block`."""
    return rate[block] if isinstance(rate, tuple) else rate
