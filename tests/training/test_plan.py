"""Plans are the best of what was measured: their solver, their goals, and the way from a model to a planned adapter."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from support.helpers import assert_same_fingerprint, fingerprint, make_tiny_var

from actvar import ActVARConfig, Execution, apply_patch, load_adapter, remove_patch, save_adapter
from actvar.calibrate import choices
from actvar.calibrate import plan as planning
from actvar.calibrate.curves import Curves
from actvar.calibrate.fit import BlockFit
from actvar.calibrate.goal import Goal
from actvar.calibrate.plan_report import Candidate
from actvar.calibrate.rates import block_losses
from actvar.calibrate.times import SHARES, SampleTimes, ScaleTimes
from actvar.calibrate.trials import choose_by_trial
from actvar.cli import main
from actvar.config import DENSE
from actvar.evaluate.predictions import DensePredictions
from actvar.patching.patch import reconfigure
from actvar.sampling.token_maps import sampled_inputs
from actvar_kernels import BackendUnavailableError
from actvar_kernels.cpu_backend import brgemm

needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")
MAPS = ((1, 1), (2, 2), (3, 3), (5, 5))


def candidate(seconds, divergence, total=None):
    return Candidate(DENSE, seconds, divergence, divergence if total is None else total)


PLANS = [candidate(2.0, 0.0), candidate(1.5, 0.2), candidate(1.2, 0.1, 0.5), candidate(1.0, 0.9)]


@pytest.mark.parametrize(
    ("goal", "place", "met"),
    [
        (Goal(speedup=1.2), 1, True),
        (Goal(speedup=1.5), 2, True),
        (Goal(speedup=2.0), 3, True),
        (Goal(speedup=2.1), 3, False),
        (Goal(budget_ms=1500), 1, True),
        (Goal(budget_ms=10), 3, False),
        (Goal(kl=0.0), 0, True),
        (Goal(kl=0.2), 2, True),
        (Goal(kl=1.0), 3, True),
    ],
    ids=str,
)
def test_a_goal_takes_the_best_plan_that_meets_it_or_the_nearest(goal, place, met):
    assert goal.best(PLANS, accelerated=2.0) == (PLANS[place], met)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected one of speedup, budget_ms, kl and preset, got none"),
        ({"speedup": 2, "kl": 0.1}, "got speedup, kl"),
        ({"speedup": 0.9}, "speedup: expected a number from 1 on, got 0.9"),
        ({"kl": -1}, "kl: expected a number from 0 on"),
        ({"preset": "nearest"}, "preset: expected one of lossless, near, fast, fastest, got 'nearest'"),
        ({"budget_ms": float("nan")}, "budget_ms"),
    ],
)
def test_wrong_goals_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Goal(**fields)


def test_times_are_those_that_were_measured_and_straight_lines_between():
    times = ScaleTimes(by_tokens=[8.0, 7.0, 4.0], by_experts=[8.0, 6.0, 5.0], by_static=[8.0, 5.0, 3.0])
    assert [times.at(share, 1) for share in SHARES] == [8, 7, 4]
    assert [times.at(1, share) for share in SHARES] == [8, 6, 5]
    assert [times.at(1, share, static=True) for share in SHARES] == [8, 5, 3]
    assert times.at(0.875, 1) == 7.5
    assert times.at(0.25, 1) == 1
    assert times.at(0.5, 0.75) == 3  # half of the tokens save half of what experts save


def sample_times(scales=(2, 3)):
    """Return times by which tokens and the end of guidance pay at both scales, and experts at the last one alone."""
    tables = {
        (True, 2): ScaleTimes([2.0, 1.6, 1.2], [2.0, 2.1, 2.2], [2.0, 1.8, 1.7]),
        (True, 3): ScaleTimes([6.0, 4.8, 3.5], [6.0, 5.0, 4.1], [6.0, 4.7, 3.4]),
        (False, 2): ScaleTimes([1.0, 0.9, 0.7], [1.0, 1.1, 1.2], [1.0, 0.9, 0.9]),
        (False, 3): ScaleTimes([3.0, 2.5, 1.8], [3.0, 2.6, 2.1], [3.0, 2.4, 1.7]),
    }
    return SampleTimes(20.0, {key: table for key, table in tables.items() if key[1] in scales})


def test_the_time_of_a_plan_is_what_its_blocks_and_scales_leave_of_the_accelerated_time():
    times = sample_times()
    assert times.predicted(DENSE, MAPS, depth=2) == 20
    config = ActVARConfig(token_rates=(1, (1, 13 / 25)), ffn_rate=1, num_experts=8)
    assert times.predicted(config, MAPS, 2) == pytest.approx(20 - (6 - times.scales[True, 3].at(13 / 25, 1)) / 2)
    assert times.predicted(replace(config, guidance_until=-1), MAPS, 2) == pytest.approx(
        20 - (6 - 3) / 2 - (6 - times.scales[False, 3].at(13 / 25, 1)) / 2
    )
    static = ActVARConfig(token_rates=(1, 1), ffn_rate=(1, (1, 0.5)), num_experts=8, static_experts=True)
    assert times.predicted(static, MAPS, 2) == pytest.approx(20 - (6 - 3.4) / 2)
    assert times.predicted(replace(DENSE, scales_until=-1, guidance_until=-1), MAPS, 2) == pytest.approx(20 - 6)
    assert SampleTimes.from_lists(json.loads(json.dumps(times.as_lists()))) == times


def curves_of(tokens, seed):
    """Return losses that fall with every token and expert that is kept."""
    generator, curves = torch.Generator().manual_seed(seed), Curves(tokens, 4)
    for name, count in (("update_lost", tokens), ("output_lost", 4), ("static_lost", 4)):
        parts = torch.rand(count, generator=generator, dtype=torch.float64) ** 3
        setattr(curves, name, torch.cat((parts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64))))
    return curves


def test_plans_are_the_best_of_all_choices_at_their_time():
    """No other choice for blocks and scales is at least as fast and has less divergence, by trying all of them."""
    base = ActVARConfig(num_experts=4)
    fits = [
        BlockFit(None, None, None, {2: curves_of(9, 2 * block), 3: curves_of(25, 2 * block + 1)}, [])
        for block in range(2)
    ]
    sensitivity = [{2: (0.1, 0.02), 3: (0.3, 0.01)}, {2: (0.05, 0.2), 3: (0.1, 0.05)}]
    times, unguided = sample_times(), [0.0, 0.1, 0.2, 0.4]
    fitted = choices.Fitted(base, fits, sensitivity, unguided, [6.0] * 4)
    plans = list(choices.fitted_plans(fitted, times, choices.LEVERS))
    assert len({config.guidance_until for config, _ in plans}) == 4
    assert {config.scales_until for config, _ in plans} == {None, -1, -2}
    whole = [plan for plan in plans if plan[0].scales_until is None]
    for end, static in itertools.product((None, -1), (False, True)):
        options = [
            choices._options(fitted, times, choices.LEVERS, scale, end is None or scale < 3, static) for scale in (2, 3)
        ]
        blocks = [block for scale in options for block in scale]
        every = [(sum(o[0] for o in choice), sum(o[1] for o in choice)) for choice in itertools.product(*blocks)]
        lost = torch.tensor([loss for loss, _ in every])
        saved = torch.tensor([saving for _, saving in every])
        meant = [plan for plan in whole if (plan[0].guidance_until, plan[0].static_experts) == (end, static)]
        assert len(meant) > 3
        for config, expected in meant:
            own = expected - (0.4 if end else 0.0)
            full = 20.0 - times.predicted(config, MAPS, 2) - (3.0 if end else 0.0)
            assert not ((saved >= full - 1e-6) & (lost < own - 1e-6)).any()


def test_levers_that_are_not_named_stay():
    base = ActVARConfig(num_experts=4)
    fits = [BlockFit(None, None, None, {2: curves_of(9, 1), 3: curves_of(25, 2)}, [])]
    sensitivity = [{2: (0.1, 0.02), 3: (0.3, 0.01)}]
    fitted = choices.Fitted(base, fits, sensitivity, [0.0, 0.1, 0.2, 0.4], [6.0] * 4)
    for config, _ in choices.fitted_plans(fitted, sample_times(), ["tokens"]):
        assert (config.guidance_until, config.scales_until, config.static_experts) == (None, None, False)
        assert {rate for rates in config.ffn_rates for rate in rates} == {1.0}
    with pytest.raises(ValueError, match=r"levers: expected some of .*, int8, static, scales, got snap"):
        planning.plan(make_tiny_var(), Goal(kl=1), ["tokens", "snap"])


def test_losses_are_those_of_the_fit_where_nothing_is_left_out():
    assert block_losses(curves_of(9, 1), 0.1, 0.2)[9, 4] == 0


def test_a_reconfigured_patch_keeps_its_gates_and_weights():
    var = make_tiny_var()
    before = fingerprint(var)
    apply_patch(var, ActVARConfig(num_experts=8))
    selectors = [block.actvar.selector for block in var.blocks]
    other = ActVARConfig(num_experts=8, token_rates=(0.5, 0.5), guidance_until=-1)
    reconfigure(var, other)
    assert var.actvar.config == other
    assert [block.actvar.selector for block in var.blocks] == selectors
    assert all(block.actvar.shared is var.actvar for block in var.blocks)
    with pytest.raises(ValueError, match="num_experts: the patch has 8, got 4"):
        reconfigure(var, replace(other, num_experts=4))
    remove_patch(var)
    assert_same_fingerprint(before, fingerprint(var))


def test_a_planned_model_has_the_divergence_that_its_report_says(tmp_path):
    var = make_tiny_var()
    report = planning.plan(var, Goal(kl=0.05), num_experts=8, batch=2, images=4, repeats=1)
    assert report.is_met
    assert report.chosen.divergence <= 0.05
    assert var.actvar.config == report.chosen.config
    assert 0 in {each.total for each in report.curve}, "the dense model is among the plans"
    save_adapter(var, tmp_path / "plan.safetensors", execution=report.chosen.execution)
    remove_patch(var)
    dense = DensePredictions(var, sampled_inputs(var, 4, 1, 4, 1.5), 1.5)
    load_adapter(var, tmp_path / "plan.safetensors")
    assert sum(dense.divergences(var)["kl_drawn"]) == pytest.approx(report.chosen.total, abs=1e-6)
    report.save_curve(tmp_path / "curve.csv", tmp_path / "curve.png")
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 1 + len(report.curve)
    again = planning.plan(var, Goal(budget_ms=1e6), adapter=tmp_path / "plan.safetensors", batch=2, images=4, repeats=1)
    assert again.is_met
    assert again.chosen.divergence == min(each.divergence for each in again.curve)


@pytest.mark.parametrize(("slowdown", "speedup"), [(0.9, 1.1), (1.0, 1.05), (1.1, 1.05)])
def test_a_plan_that_is_faster_or_slower_than_predicted_corrects_the_choice(slowdown, speedup, monkeypatch):
    monkeypatch.setattr(planning, "measured_times", lambda *_: [sample_times()])
    measured = []

    def on_a_machine_that_is_off(model, chosen, *_):
        measured.append(chosen)
        return 20.0, slowdown * chosen.seconds

    monkeypatch.setattr(planning, "_measured", on_a_machine_that_is_off)
    goal = Goal(speedup=speedup)
    report = planning.plan(make_tiny_var(), goal, ["tokens"], num_experts=8, batch=2, images=4, repeats=1)
    assert report.is_met
    assert report.predicted_ms == pytest.approx(report.measured_ms, rel=0.05)
    real = [replace(each, seconds=slowdown * each.seconds if each.total else 20.0) for each in report.curve]
    assert report.chosen.config == goal.best(real, accelerated=20.0)[0].config
    assert len(measured) == (1 if slowdown == 1 else 2)


def test_a_plan_that_is_slower_than_the_dense_model_gives_way_to_it():
    dense, plan = curve = [Candidate(DENSE, 20.0, 0, 0), Candidate(replace(DENSE, guidance_until=-1), 10.0, 0.1, 0.2)]
    is_met, chosen, *_ = choose_by_trial(Goal(kl=1), curve, 20.0, lambda tried: (20.0, 30.0 if tried is plan else 20.0))
    assert is_met
    assert chosen is dense


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_plans_are_measured_from_the_ends_inwards(count):
    guesses = [Candidate(DENSE, float(seconds), 0, float(count - seconds)) for seconds in range(count)]
    beaten = Candidate(DENSE, count - 0.5, 0, count + 1.0)
    found = [guess.seconds for guess in planning._worth_measuring([*guesses, beaten])]
    assert len(found) == min(count, planning.MOST_PLANS)
    assert found[:2] == [count - 1, 0][:count]
    gaps = [max(b - a for a, b in itertools.pairwise(sorted(found[:measured]))) for measured in range(2, len(found))]
    assert all(gap <= 1.2 * 2 * count / (measured - 1) for measured, gap in enumerate(gaps, 2)), "evenly spread"


def test_plans_that_take_long_are_as_many_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(planning, "SECONDS_OF_PLANS", 0)
    monkeypatch.setattr(planning, "measured_times", lambda *_: [sample_times()])
    report = planning.plan(make_tiny_var(), Goal(kl=0.05), ["tokens"], num_experts=8, batch=2, images=4, repeats=1)
    assert len(report.curve) == planning.FEWEST_PLANS
    assert [each.seconds for each in report.curve] == sorted((each.seconds for each in report.curve), reverse=True)
    assert report.is_met


def test_an_adapter_with_an_end_of_guidance_keeps_it(tmp_path):
    var = make_tiny_var()
    apply_patch(var, ActVARConfig(num_experts=8, guidance_until=1, weights_from=1))
    save_adapter(var, tmp_path / "adapter.safetensors")
    arguments = dict(adapter=tmp_path / "adapter.safetensors", batch=2, images=4, repeats=1)
    with pytest.raises(ValueError, match="levers: the adapter has its end of guidance"):
        planning.plan(var, Goal(kl=1), ["tokens"], **arguments)
    report = planning.plan(var, Goal(kl=10), **arguments)
    assert {each.config.guidance_until for each in report.curve} == {1}


@pytest.mark.slow
def test_the_command_writes_adapter_report_and_curve_or_the_nearest_plan(tmp_path, capsys):
    common = ["calibrate", "--model", "fashion-mnist", "--samples", "4", "--batch", "2", "--repeats", "1"]
    main([*common, "--kl", "0.5", "--out", str(tmp_path / "a.safetensors")])
    assert "over accelerated" in capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["kl"] <= 0.5
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as ended:
        main([*common, "--speedup", "50", "--levers", "tokens", "--out", str(tmp_path / "b.safetensors")])
    assert ended.value.code == 1
    assert "no plan meets the goal" in capsys.readouterr().out
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speedup", "2", "--rates", "0.5", "0.5", "1"], "--rates, --uniform: a plan finds the rates itself"),
        (["--speedup", "2", "--kl", "0.1"], "got speedup, kl"),
        (["--adapter", "best"], "--adapter: expected a goal with it"),
    ],
)
def test_options_that_exclude_one_another_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--model", "fashion-mnist", "--out", str(tmp_path / "a.safetensors"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_products_in_eight_bits_are_a_lever_only_where_they_run(monkeypatch, caplog):
    monkeypatch.setattr(brgemm, "runs", lambda dtype: False)
    with pytest.raises(BackendUnavailableError, match="levers: a product in int8"):
        planning.plan(make_tiny_var(), Goal(kl=1), ["int8"])
    report = planning.plan(make_tiny_var(), Goal(kl=0.05), num_experts=8, batch=2, images=4, repeats=1)
    assert all(each.execution.weights is None for each in report.curve)
    assert "plans have no products in eight bits" in caplog.text


@needs_bytes
def test_a_plan_may_multiply_in_eight_bits(tmp_path):
    var = make_tiny_var()
    report = planning.plan(var, Goal(kl=0.05), ["int8"], num_experts=8, batch=2, images=4, repeats=1)
    formats = {each.execution.weights: each for each in report.curve}
    assert set(formats) <= {None, "int8"}
    assert var.actvar.execution == report.chosen.execution
    if "int8" in formats:
        assert 0 < formats["int8"].divergence < 0.05
        assert formats["int8"].total > formats["int8"].divergence  # every scale changes


@needs_bytes
def test_an_adapter_that_multiplies_in_eight_bits_keeps_it(tmp_path):
    var = apply_patch(make_tiny_var(), ActVARConfig(num_experts=8), Execution(weights="int8"))
    path = tmp_path / "adapter.safetensors"
    save_adapter(var, path, execution=Execution(weights="int8"))
    report = planning.plan(make_tiny_var(), Goal(kl=10), adapter=path, batch=2, images=4, repeats=1)
    assert {each.execution.weights for each in report.curve} == {"int8"}
