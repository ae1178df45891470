from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actvar import ActVARConfig
from actvar.config import share_of
from actvar.sparse.schedule import build_schedule

OFFICIAL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
OFFICIAL_MAPS = tuple((side, side) for side in OFFICIAL)


def test_the_default_is_the_papers_configuration():
    steps = build_schedule(ActVARConfig(), OFFICIAL_MAPS)
    assert [(s.keep, s.experts) for s in steps[-2:]] == [(127, 12), (192, 12)]
    assert [s.active for s in steps] == [False] * 8 + [True] * 2


def test_the_cache_holds_kept_rows_only_unless_all_are_asked_for():
    compact, full = (build_schedule(ActVARConfig(kv=kv), OFFICIAL_MAPS)[-1] for kv in ("compact", "all"))
    before = sum(p * p for p in OFFICIAL[:-2])
    assert (compact.cached_before, full.cached_before) == (before + 127, before + 169)


def test_ffn_rate_can_differ_per_scale():
    steps = build_schedule(ActVARConfig(ffn_rate=(0.5, 0.25)), OFFICIAL_MAPS)
    assert [s.experts for s in steps[-2:]] == [8, 4]


def test_a_rate_of_one_switches_its_operation_off_unless_forced():
    off = build_schedule(ActVARConfig(token_rates=(1, 0.5), ffn_rate=1), OFFICIAL_MAPS)[-2:]
    assert [(s.select, s.route) for s in off] == [(False, False), (True, False)]
    forced = build_schedule(ActVARConfig(token_rates=(1, 1), ffn_rate=1, always_sparse=True), OFFICIAL_MAPS)
    assert [(s.select, s.route) for s in forced[-3:]] == [(False, False), (True, True), (True, True)]


@pytest.mark.parametrize(
    ("rate", "count", "expected"), [(0.75, 169, 127), (0.75, 256, 192), (0.001, 5, 1), (1.0, 7, 7), (0.5, 5, 3)]
)
def test_shares_round_half_up_and_are_at_least_one(rate, count, expected):
    assert share_of(rate, count) == expected


rates = st.floats(0.01, 1.0)


@given(
    scales=st.lists(st.integers(-10, 9), min_size=1, max_size=4, unique_by=lambda s: s % 10),
    data=st.data(),
    num_experts=st.integers(1, 64),
    kv=st.sampled_from(["compact", "all"]),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_every_valid_configuration_survives_json_and_gives_a_schedule(scales, data, num_experts, kv, flags):
    per_scale = st.lists(rates, min_size=len(scales), max_size=len(scales)).map(tuple)
    config = ActVARConfig(
        tuple(scales), data.draw(per_scale), data.draw(st.one_of(rates, per_scale)), num_experts, kv, *flags
    )
    assert ActVARConfig.from_json(config.to_json()) == config
    for step in build_schedule(config, OFFICIAL_MAPS):
        assert 1 <= step.keep <= step.tokens
        assert 1 <= step.experts <= num_experts


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(token_rates=(0.75, 0)), ValueError, r"token_rates: expected a number in \(0, 1\], got 0"),
        (dict(token_rates=(0.75, 1.1)), ValueError, "token_rates"),
        (dict(token_rates=(0.75, float("nan"))), ValueError, "token_rates"),
        (dict(token_rates=(0.75,)), ValueError, "one rate per scale"),
        (dict(token_rates="75"), TypeError, "token_rates"),
        (dict(token_rates=0.75), TypeError, "token_rates"),
        (dict(ffn_rate=0.0), ValueError, "ffn_rate"),
        (dict(ffn_rate=(0.5,)), ValueError, "one rate per scale"),
        (dict(ffn_rate=None), TypeError, "ffn_rate"),
        (dict(ffn_rate=True), TypeError, "ffn_rate"),
        (dict(num_experts=0), ValueError, "num_experts"),
        (dict(num_experts=16.0), TypeError, "num_experts"),
        (dict(scales=()), TypeError, "scales"),
        (dict(scales=(-2, 1.5)), TypeError, "scales"),
        (dict(kv="none"), ValueError, "kv"),
        (dict(share_cfg_selection=1), TypeError, "share_cfg_selection"),
        (dict(fixed_tokens=1), TypeError, "fixed_tokens"),
        (dict(fixed_tokens=True, token_rates=((0.5, 1.0), 0.5)), ValueError, "expected those of all blocks"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(fields, error, message):
    with pytest.raises(error, match=message):
        ActVARConfig(**fields)


@pytest.mark.parametrize("scales", [(-2, 11), (-2, 8), (8, 8)])
def test_scales_must_exist_once_in_the_model(scales):
    with pytest.raises(ValueError, match="scales"):
        build_schedule(ActVARConfig(scales=scales), OFFICIAL_MAPS)


@pytest.mark.parametrize("text", ["[]", "{", '{"rates": 1}', '{"kv": "none"}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|Expecting"):
        ActVARConfig.from_json(text)
