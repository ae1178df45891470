"""FLOPs of Infinity: formula, counter, and the tables of where the cost lies at 1024 px."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from PIL import Image
from support.infinity import TINY_SCHEDULE, tiny_infinity, tiny_text

from actvar import ActVARConfig, apply_patch
from actvar.cli import main
from actvar.config import DENSE
from actvar.flops import MODULES, StepFlops
from actvar.models import build_infinity, scale_schedule
from actvar.models.infinity.build import OFFICIAL_SIZES
from actvar.reports.infinity import counted_infinity_flops, infinity_flops
from actvar.reports.infinity import report as report_module
from actvar.reports.infinity.report import InfinityReport, block_total

VARIANTS = {
    "one place a token": {},
    "patchified": dict(patchify=True),
    "one chunk": dict(block_chunks=1),
    "other sizes": dict(bits=6, depth=3, block_chunks=3, embed_dim=96, num_heads=3, text_maxlen=7),
}
CONFIGS = [
    ActVARConfig(),
    ActVARConfig(kv="all"),
    ActVARConfig(ffn_rate=1),
    ActVARConfig(scales=(1, 2), token_rates=(1, 0.5), ffn_rate=(0.5, 0.25), num_experts=8),
    ActVARConfig(guidance_until=-1),
]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_formula_and_counter_agree_by_module_and_scale(changes):
    _, infinity = tiny_infinity(**changes)
    assert infinity_flops(infinity, TINY_SCHEDULE, 3, 5) == counted_infinity_flops(infinity, TINY_SCHEDULE, 3, 5)


@pytest.mark.parametrize("config", CONFIGS)
def test_formula_and_counter_agree_with_actvar(config):
    _, infinity = tiny_infinity()
    apply_patch(infinity, config)
    counted = counted_infinity_flops(infinity, TINY_SCHEDULE, 2, 5)
    assert infinity_flops(infinity, TINY_SCHEDULE, 2, 5, config) == counted


def test_counting_leaves_the_model_as_it_was():
    _, infinity = tiny_infinity()
    before = {name: tensor.clone() for name, tensor in infinity.state_dict().items()}
    schedule = [(1, 1, 1), (1, 2, 5)]  # of no other test, so that no angles of it are kept
    counted_infinity_flops(infinity, schedule, 1, 5)
    assert infinity.sample(*tiny_text([2]), schedule, g_seed=0).isfinite().all()
    assert all((before[name] == tensor).all() for name, tensor in infinity.state_dict().items())
    assert not infinity.head._forward_hooks
    assert "decode" not in vars(infinity)


@pytest.mark.parametrize("config", [DENSE, *CONFIGS])
def test_the_formula_equals_a_count_over_tokens_and_experts(config):
    _, infinity = tiny_infinity()
    C, N, T, Ct, images = infinity.C, config.num_experts, 5, infinity.text_channels, 2
    linear = lambda inputs, outputs: 2 * inputs * outputs  # noqa: E731
    rates = {scale % 3: rate for scale, rate in zip(config.scales, config.token_rates, strict=True)}
    ffn_rates = {scale % 3: rate for scale, rate in zip(config.scales, config.ffn_rates, strict=True)}
    cached = 0
    for index, step in enumerate(infinity_flops(infinity, TINY_SCHEDULE, images, T, config)):
        tokens = range(TINY_SCHEDULE[index][1] * TINY_SCHEDULE[index][2])
        kept = tokens[: max(1, int(rates.get(index, 1) * len(tokens) + 0.5))]
        own, rate = (kept if config.kv == "compact" else tokens), ffn_rates.get(index, 1)
        rows = images * (2 if config.guidance_until is None or index < config.guidance_until % 3 else 1)
        flops = Counter(dict.fromkeys(MODULES, 0))
        for _row in range(rows):
            flops["head"] += sum(linear(C, 2 * infinity.token_bits) for _token in tokens)
            flops["adaln"] += linear(C, 2 * C) + (linear(C, 6 * C) if not index else 0)
            if not index:
                flops["text"] += sum(linear(Ct, C) + linear(C, C) + linear(Ct, 2 * C) + 4 * C for _text in range(T))
                flops["text"] += linear(C, C)
            for _block in range(infinity.depth):
                flops["selector"] += sum(linear(C, 1) for _token in tokens) if len(kept) < len(tokens) else 0
                flops["qkv"] += sum(linear(C, C) for _token in kept) + sum(linear(C, 2 * C) for _token in own)
                flops["cross"] += sum(linear(C, 2 * C) for _text in range(T)) if not index else 0
                for _token in kept:
                    flops["attention"] += sum(4 * C for _key in range(cached + len(own)))
                    flops["proj"] += linear(C, C)
                    flops["cross"] += 2 * linear(C, C) + sum(4 * C for _text in range(T))
                    flops["ffn"] += round(rate * N) * (linear(C, 4 * C // N) + linear(4 * C // N, C))
                    flops["router"] += linear(C, N) if rate < 1 else 0
        flops["head"] += images * len(tokens) * linear(infinity.token_bits, C) if index else 0
        assert {module: getattr(step, module) for module in MODULES} == flops
        cached += len(own)


# The tables of where the cost lies, which count that the public code projects the texts' keys at every scale.


@cache
def official(model: str) -> tuple:
    return build_infinity(**OFFICIAL_SIZES[model], device="meta")


def as_the_public_code(model: str, config: ActVARConfig = DENSE) -> list[StepFlops]:
    """Return the FLOPs at 1024 px with keys and values of the text projected at every scale."""
    infinity = official(model)[1]
    steps = infinity_flops(infinity, scale_schedule(), 1, 64, config)
    until = len(steps) if config.guidance_until is None else config.guidance_until % len(steps)
    again = infinity.depth * 4 * infinity.C**2 * 64
    return [
        replace(step, cross=step.cross + (0 if not i else (2 if i < until else 1) * again))
        for i, step in enumerate(steps)
    ]


def report_of(model: str, config: ActVARConfig = DENSE) -> InfinityReport:
    formula = {"dense": as_the_public_code(model), "actvar": as_the_public_code(model, config)}
    maps = tuple((h, w) for _, h, w in scale_schedule())
    return InfinityReport(model, 1, config, maps, formula, {}, 0, [], 64, {})


SHARES = {
    "infinity-2b": (
        116.2,
        {
            "all": (100, 100, 19.5, 30.9, 10.8, 38.9),
            "48x48": (21.9, 21.7, 19.6, 30.8, 10.4, 39.2),
            "64x64": (38.9, 46.1, 16.4, 42.2, 8.6, 32.8),
            "last 2": (60.8, 67.8),
            "last 3": (76.0, 81.2),
            "last 4": (85.8, 89.1),
        },
    ),
    "infinity-8b": (
        385.5,
        {
            "all": (100, 100, 22.4, 20.4, 12.3, 44.9),
            "48x48": (21.9, 21.7, 22.7, 20.3, 11.8, 45.3),
            "64x64": (38.9, 43.5, 20.0, 29.4, 10.4, 40.1),
            "last 2": (60.8, 65.3),
            "last 3": (76.0, 79.3),
            "last 4": (85.8, 87.8),
        },
    ),
}


@pytest.mark.parametrize("model", SHARES)
def test_where_the_cost_lies_at_1024_px(model):
    total, rows = SHARES[model]
    report = report_of(model)
    assert sum(map(block_total, report.formula["dense"])) / 1e12 == pytest.approx(total, abs=0.05)
    shares = {share.name: share for share in report.shares()}
    assert shares.keys() == rows.keys()
    for name, row in rows.items():
        values = [100 * value for value in (shares[name].tokens, shares[name].flops, *shares[name].parts.values())]
        for column, (value, expected) in enumerate(zip(values, row, strict=False)):
            digits = 0.1 if column == 2 else 0.05  # the third is the sum of two rounded numbers
            assert value == pytest.approx(expected, abs=digits + 1e-9), (name, column)


def plan(last: int, tokens: float, ffn: float, guidance_until: int | None = None) -> ActVARConfig:
    return ActVARConfig(
        scales=tuple(range(-last, 0)), token_rates=(tokens,) * last, ffn_rate=ffn, guidance_until=guidance_until
    )


PLANS = {
    "tokens and experts": [(plan(2, 0.75, 0.75), 1.32), (plan(3, 0.75, 0.75), 1.42), (plan(4, 0.75, 0.75), 1.49)],
    "tokens": [(plan(2, 0.75, 1), 1.24), (plan(3, 0.75, 1), 1.32), (plan(4, 0.75, 1), 1.36)],
    "experts": [(plan(2, 1, 0.75), 1.06), (plan(3, 1, 0.75), 1.08), (plan(4, 1, 0.75), 1.09)],
    "half the tokens": [(plan(2, 0.5, 0.75), 1.68), (plan(3, 0.5, 0.75), 1.97), (plan(4, 0.5, 0.75), 2.20)],
    "guidance": [(plan(2, 1, 1, -2), 1.51), (plan(2, 1, 1, -3), 1.68)],
    "composed": [(plan(2, 0.75, 0.75, -2), 1.85), (plan(3, 0.75, 0.75, -3), 2.24), (plan(3, 0.5, 0.75, -2), 2.66)],
}


@pytest.mark.parametrize(
    ("config", "fewer"), [case for cases in PLANS.values() for case in cases],
    ids=[f"{name} {fewer}" for name, cases in PLANS.items() for _, fewer in cases],
)  # fmt: skip
def test_plans_save_what_the_table_says(config, fewer):
    assert report_of("infinity-2b", config).fewer == pytest.approx(fewer, abs=0.006)


@pytest.mark.parametrize(("model", "parameters"), [("infinity-2b", 2.2e9), ("infinity-8b", 8.4e9)])
def test_official_sizes_have_the_published_numbers_of_parameters(model, parameters):
    assert sum(p.numel() for p in official(model)[1].parameters()) == pytest.approx(parameters, rel=0.1)


# The command.


@pytest.fixture
def small_official(monkeypatch):
    """Let a small model stand for the 2B one."""
    small = dict(bits=4, spatial_patchify=0, depth=2, embed_dim=64, num_heads=2, block_chunks=1, text_channels=128)
    monkeypatch.setitem(OFFICIAL_SIZES, "infinity-2b", small)


def flops(*arguments: str) -> None:
    main(["flops", "--model", "infinity-2b", "--pn", "0.06M", *arguments])


@pytest.mark.usefixtures("small_official")
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    files = ["--json", str(tmp_path / "flops.json"), "--plot", str(tmp_path / "flops.png")]
    flops("--aspect", "16:9", "--rates", "0.5", "0.25", "0.5", "--guidance-until", "-1", "--text-tokens", "7", *files)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "flops.json").read_text())
    assert (
        "images of 336x192 pixels, the template nearest to 16:9; 472 tokens in 7 scales; texts of 7 tokens" in printed
    )
    assert written["config"]["guidance_until"] == -1
    assert written["text_tokens"] == 7
    assert written["maps"][-1] == [12, 21]
    assert written["formula"]["dense"] == written["counted"]["dense"]
    assert list(written["formula"]["actvar"][-1]) == list(MODULES)
    assert f"{written['saving']['formula']:.2%} by formula" in printed
    assert f"blocks with ActVAR: {written['fewer']:.2f}x fewer FLOPs" in printed
    for share in written["shares"]:
        line = next(line for line in printed.splitlines() if line.startswith(f"{share['name']:<20}"))
        values = (share["tokens"], share["flops"], *share["parts"].values())
        assert line.split()[-6:] == [f"{value:.1%}" for value in values]
    for part, size in written["memory"]["dense"].items():
        line = next(line for line in printed.splitlines() if line.startswith(part))
        assert line.split()[-2:] == [f"{size / 2**30:.2f}", f"{written['memory']['actvar'][part] / 2**30:.2f}"]
    assert Image.open(tmp_path / "flops.png").size[0] > 1000


@pytest.mark.usefixtures("small_official")
def test_a_counter_that_differs_by_more_than_a_percent_is_exit_code_1(monkeypatch, capsys):
    count = report_module.counted_infinity_flops

    def wrong(*args):
        *steps, last = count(*args)
        return [*steps, replace(last, cross=round(last.cross * 1.02))]

    monkeypatch.setattr(report_module, "counted_infinity_flops", wrong)
    with pytest.raises(SystemExit) as stopped:
        flops()
    assert stopped.value.code == 1
    assert "differ by at most 2.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "infinity-9b"], "invalid choice"),
        (["--model", "infinity-2b", "--pn", "2M"], "--pn: invalid choice"),
        (["--model", "infinity-2b", "--aspect", "wide"], "expected width and height such as 16:9, got 'wide'"),
        (["--model", "infinity-2b", "--aspect", "1:0"], "expected width and height such as 16:9, got '1:0'"),
        (["--model", "infinity-2b", "--text-tokens", "0"], "expected a whole number of at least 1"),
        (["--model", "infinity-2b", "--paper"], "--paper: expected a model of VAR"),
        (["--model", "infinity-2b", "--pn", "0.06M", "--rates", *["0.5"] * 9], "the model has 7 scales"),
        (["--model", "infinity-2b", "--guidance-until", "0"], "--guidance-until: expected at least the first scale"),
        (["--model", "d16", "--pn", "1M"], "--pn belongs to infinity-2b and infinity-8b"),
        (["--model", "d16", "--aspect", "1:1"], "--aspect belongs to infinity-2b"),
        (["--model", "fashion-mnist", "--text-tokens", "9"], "--text-tokens belongs to infinity-2b"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["flops", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("actvar flops: ")


@pytest.mark.slow
@pytest.mark.parametrize("model", OFFICIAL_SIZES)
def test_formula_and_counter_agree_on_the_official_sizes(model):
    infinity, schedule = official(model)[1], scale_schedule()
    assert infinity_flops(infinity, schedule, 1, 64) == counted_infinity_flops(infinity, schedule, 1, 64)
