"""Say which scales are sparse, and how much."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from actvar.execution import expect_no_execution
from actvar.utils.fields import check_choice, check_names, json_object
from actvar_kernels.checks import as_integer, as_items, as_number

KV_MODES = ("compact", "all")
MOST_EXPERTS = 2**20


Rate = float | tuple[float, ...]
"""A rate at one scale: one number for all blocks, or a tuple with one per block."""


def share_of(rate: float, count: int) -> int:
    """Return the part `rate` of `count` as `floor(rate * count + 0.5)`, at least 1."""
    return max(1, math.floor(float(rate) * count + 0.5))


@dataclass(frozen=True)
class ActVARConfig:
    """Say what is computed: rates and variants of ActVAR. The default is the paper's (0.75, 0.75; 0.75).

    Adapters hold a configuration. `actvar.Execution` says how the model is run.

    Numbers of any kind become Python's own: numpy's, and arrays and tensors without dimensions. Arrays and tensors with
    dimensions, and lists, become tuples.

    Args:
        scales: numbers of the active scales, negative ones from the end.
        token_rates: share of the tokens that each active scale updates, in (0, 1]. A scale may have a tuple with a rate
            for each block.
        ffn_rate: share of the experts that are on per token, in (0, 1]: one number for all active scales, or a tuple
            with a rate for each scale, which may again be a tuple with one for each block.
        num_experts: groups that the FFN's hidden units are cut into; must divide the hidden size.
        kv: `"compact"` caches keys and values of kept tokens only (Eq. 8); `"all"` projects and caches all tokens of
            an active scale.
        share_cfg_selection: whether the conditional row chooses the tokens of both rows under guidance.
        fixed_tokens: whether the first block chooses the tokens that all blocks update, as fixed token pruning does
            (the rival in the paper's Table 4). Every token rate then holds for all blocks.
        static_experts: whether the first experts are on for every token, instead of those that a router chooses: static
            pruning, of the hidden units that lie last.
        guidance_until: number of the first scale without guidance, negative from the end. From there on the conditional
            rows alone are computed, and tokens are drawn from their logits. None for guidance at every scale.
        guidance_strength: the `cfg` whose guided logits an adapter's weights imitate from `guidance_until` on. With a
            smaller one, sampling uses weights in between the model's own and the adapter's, in proportion
            (`actvar.sparse.strength`). None for weights that do not depend on it.
        scales_until: number of the first scale that is left out, negative from the end. Sampling ends before it, and
            the image is decoded from the token maps so far. None for all scales.
        weights_from: number of the first scale at which the weights that an adapter brings are used, negative from the
            end. Earlier scales have the model's own. None for the adapter's weights at every scale.
        always_sparse: whether every sparse operation runs even where a rate is 1 and it changes nothing, for checks.

    Raises:
        TypeError: a field of a wrong type, or a field of `actvar.Execution`.
        ValueError: a field out of its range, or fields that do not fit together.
    """

    scales: tuple[int, ...] = (-2, -1)
    token_rates: tuple[Rate, ...] = (0.75, 0.75)
    ffn_rate: float | tuple[Rate, ...] = 0.75
    num_experts: int = 16
    kv: str = "compact"
    share_cfg_selection: bool = False
    fixed_tokens: bool = False
    static_experts: bool = False
    guidance_until: int | None = None
    guidance_strength: float | None = None
    scales_until: int | None = None
    weights_from: int | None = None
    always_sparse: bool = False

    def __new__(cls, *args, **named):
        expect_no_execution(named)
        return super().__new__(cls)

    def __post_init__(self):
        converted = {
            "scales": _tuple_of("scales", self.scales, as_integer),
            "token_rates": _tuple_of("token_rates", self.token_rates, _rate_or_rates),
            "ffn_rate": _rate_or_rates("ffn_rate", self.ffn_rate, _rate_or_rates),
            "num_experts": as_integer("num_experts", self.num_experts),
        }
        for name in ("share_cfg_selection", "fixed_tokens", "static_experts", "always_sparse"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
            converted[name] = bool(getattr(self, name))
        for name in ("guidance_until", "scales_until", "weights_from"):
            value = getattr(self, name)
            converted[name] = value if value is None else as_integer(name, value)
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        for name in ("token_rates", "ffn_rate"):
            rates = getattr(self, name)
            if isinstance(rates, tuple) and len(rates) != len(self.scales):
                raise ValueError(f"{name}: expected one rate per scale in {self.scales}, got {rates}")
        counts = {len(rate) for rate in (*self.token_rates, *self.ffn_rates) if isinstance(rate, tuple)}
        if len(counts) > 1:
            raise ValueError(f"token_rates, ffn_rate: expected rates for equally many blocks, got {sorted(counts)}")
        if not 1 <= self.num_experts <= MOST_EXPERTS:
            raise ValueError(f"num_experts: expected between 1 and {MOST_EXPERTS}, got {self.num_experts}")
        check_choice("kv", self.kv, KV_MODES)
        if self.guidance_strength is not None:
            strength = as_number("guidance_strength", self.guidance_strength, "a number above 0")
            if not 0 < strength < math.inf or self.guidance_until is None:
                raise ValueError(
                    "guidance_strength: expected a finite number above 0, with guidance_until, got "
                    f"{self.guidance_strength} and guidance_until={self.guidance_until}"
                )
            object.__setattr__(self, "guidance_strength", strength)
        if self.fixed_tokens and any(isinstance(rate, tuple) for rate in self.token_rates):
            raise ValueError(f"token_rates: expected those of all blocks, with fixed_tokens, got {self.token_rates}")

    @property
    def ffn_rates(self) -> tuple[Rate, ...]:
        """Return the FFN rate of each active scale."""
        return self.ffn_rate if isinstance(self.ffn_rate, tuple) else (self.ffn_rate,) * len(self.scales)

    @property
    def num_blocks(self) -> int | None:
        """Return the number of blocks that rates are given for, or None where every rate holds for all."""
        counts = {len(rate) for rate in (*self.token_rates, *self.ffn_rates) if isinstance(rate, tuple)}
        return counts.pop() if counts else None

    @property
    def is_sparse(self) -> bool:
        """Return whether any rate is below 1."""
        rates = (*self.token_rates, *self.ffn_rates)
        return any(min(rate) < 1 if isinstance(rate, tuple) else rate < 1 for rate in rates)

    def without_savings(self) -> ActVARConfig:
        """Return the configuration with all scales, tokens, experts and guidance; other variants stay."""
        ones = (1.0,) * len(self.scales)
        none = dict.fromkeys(("guidance_until", "guidance_strength", "scales_until"))
        return replace(self, token_rates=ones, ffn_rate=1.0, always_sparse=False, **none)

    def to_json(self) -> str:
        """Return all fields as the text of a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ActVARConfig:
        """Return the configuration that `to_json` wrote as `text`.

        Raises:
            TypeError, ValueError: `text` is no JSON object, or one with a field that is unknown, wrong or one of
                `actvar.Execution`.
        """
        values = json_object(text)
        expect_no_execution(values)
        check_names(values, {field.name for field in fields(cls)})
        return cls(**values)


def _rate(name: str, value: object) -> float:
    """Return a rate as a float in (0, 1]."""
    rate = as_number(name, value, "a number in (0, 1]")
    if not 0 < rate <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {rate}")
    return rate


def _rate_or_rates(name: str, value: object, convert: Callable = _rate) -> Any:
    """Return one rate, or a tuple of the items of `value` after `convert`."""
    return _rate(name, value) if as_items(value) is None else _tuple_of(name, value, convert)


def _tuple_of(name: str, values: object, convert: Callable) -> tuple:
    """Return the items of `values`, of which there must be one, after `convert`."""
    items = as_items(values)
    if not items:
        raise TypeError(f"{name}: expected a non-empty tuple, got {values!r:.100}")
    return tuple(convert(name, item) for item in items)


DENSE = ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=1.0)
"""Rates of 1, at which the results are the dense model's."""
