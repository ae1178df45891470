"""Static units and ends of sampling are levers of a plan, and a plan that was interrupted goes on where it was."""

from __future__ import annotations

import pytest
import torch
from support.helpers import make_tiny_var
from support.toy_family import ToyFamily, ToyModel

import actvar.families
from actvar import ActVARConfig, apply_patch, remove_patch, save_adapter
from actvar.calibrate import choices
from actvar.calibrate import plan as planning
from actvar.calibrate.calibration import fits_of, samples_to_fit
from actvar.calibrate.fit_file import load_fits, save_fits
from actvar.calibrate.goal import Goal
from actvar.evaluate.predictions import DensePredictions
from actvar.families.var import VARFamily
from actvar.sampling.token_maps import sampled_inputs

SMALL = dict(batch=2, images=4, repeats=1)


def test_a_plan_has_the_units_of_static_pruning_in_their_order():
    var = make_tiny_var()
    report = planning.plan(var, Goal(speedup=1), ["static"], num_experts=8, **SMALL)
    static = [each for each in report.curve if each.config.is_sparse]
    assert static
    assert all(each.config.static_experts for each in static)
    dense = DensePredictions(remove_patch(var), sampled_inputs(var, 4, 1, 4, 1.5), 1.5)
    report = planning.plan(var, Goal(kl=max(each.divergence for each in static)), ["static"], num_experts=8, **SMALL)
    assert report.is_met
    divergences = dense.divergences(var)["kl_drawn"]
    changed = [scale.index for scale in var.actvar.schedule if scale.active]
    assert sum(divergences[scale] for scale in changed) == pytest.approx(report.chosen.total, abs=1e-6)


def test_a_scale_that_is_left_out_counts_as_one_that_is_drawn_uniformly():
    var = make_tiny_var()
    uniform = DensePredictions(var, sampled_inputs(var, 4, 1, 4, 1.5), 1.5).divergences_from_uniform
    assert all(0 < divergence < torch.tensor(float(var.V)).log() for divergence in uniform)
    report = planning.plan(var, Goal(speedup=1e6), ["scales"], num_experts=8, **SMALL)
    assert not report.is_met
    totals = {each.config.scales_until: each.total for each in report.curve}
    assert totals.pop(None) == 0
    assert totals
    for until, total in totals.items():
        assert total == pytest.approx(sum(uniform[until:]), abs=1e-5)


def test_plans_of_another_family_have_all_levers(monkeypatch):
    monkeypatch.setattr(actvar.families, "FAMILIES", (VARFamily(), ToyFamily()))
    levers = [lever for lever in choices.LEVERS if lever != "int8"]
    report = planning.plan(ToyModel().eval(), Goal(kl=0.3), levers, num_experts=8, **SMALL)
    assert report.is_met
    assert len(report.curve) > 3


@pytest.mark.parametrize(
    ("config", "levers", "message"),
    [
        (ActVARConfig(num_experts=8), ["static"], "the adapter's experts are chosen by routers, got static"),
        (ActVARConfig(num_experts=8, static_experts=True), ["experts"], "the adapter's experts are static"),
    ],
    ids=["routed", "static"],
)
def test_levers_that_an_adapter_does_not_have_are_refused(config, levers, message, tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(apply_patch(make_tiny_var(), config), path)
    with pytest.raises(ValueError, match=message):
        planning.plan(make_tiny_var(), Goal(kl=1), levers, adapter=path, **SMALL)
    report = planning.plan(make_tiny_var(), Goal(kl=10), adapter=path, **SMALL)
    assert {each.config.static_experts for each in report.curve} == {config.static_experts}
    assert len({each.config.ffn_rates for each in report.curve}) > 1


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["divergence_per_block", "_worth_measuring", "_measured"])
def test_an_interrupted_plan_goes_on_where_it_was(stage, tmp_path, monkeypatch):
    arguments = dict(num_experts=8, **SMALL, folder=tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(planning, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            planning.plan(make_tiny_var(), Goal(kl=0.1), ["tokens", "static"], **arguments)
    for done in ("fits_of", "measured_times", *(["_divergence"] if stage == "_measured" else [])):
        monkeypatch.setattr(planning, done, interrupted)
    var = make_tiny_var()
    report = planning.plan(var, Goal(kl=0.1), ["tokens", "static"], **arguments)
    assert report.is_met
    assert not (tmp_path / "parts").exists()
    assert var.actvar.config == report.chosen.config


def test_other_arguments_do_not_go_on_from_an_interrupted_plan(tmp_path, monkeypatch):
    arguments = dict(num_experts=8, **SMALL, folder=tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "_measured", interrupted)
        with pytest.raises(KeyboardInterrupt):
            planning.plan(make_tiny_var(), Goal(kl=0.1), ["tokens"], **arguments)
    monkeypatch.setattr(planning, "fits_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planning.plan(make_tiny_var(), Goal(kl=0.1), ["tokens"], **arguments | {"cfg": 2.0})


def test_fits_are_read_as_they_were_written(tmp_path):
    var = make_tiny_var()
    fits = fits_of(var, ActVARConfig(num_experts=8), samples_to_fit(var, 4, 0, 1.5))
    save_fits(fits, tmp_path / "fits.safetensors")
    for ours, theirs in zip(load_fits(tmp_path / "fits.safetensors", torch.device("cpu")), fits, strict=True):
        assert all(map(torch.equal, ours.router, theirs.router))
        for name in ("selector", "order", "static_order"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for scale, curves in theirs.curves.items():
            for name, value in vars(curves).items():
                found = getattr(ours.curves[scale], name)
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_the_curve_of_static_units_has_the_energy_of_those_that_are_off():
    var = make_tiny_var()
    (fit, *_) = fits_of(var, ActVARConfig(num_experts=8), samples_to_fit(var, 4, 0, 1.5))
    curves = fit.curves[3]
    assert curves.static_lost[-1] == 0
    assert curves.static_lost[0] == pytest.approx(curves.output_lost[0].item())
    assert curves.static_lost[4] < curves.static_lost[0]
