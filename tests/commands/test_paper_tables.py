from __future__ import annotations

import dataclasses
import functools
import os

import pytest
import torch
from support.helpers import make_tiny_var

from actvar import ActVARConfig
from actvar.distill import run
from actvar.distill.data import sampled_source
from actvar.patching.adapter import describe_adapter
from benchmarks.paper import measure as measure_module
from benchmarks.paper import recipes
from benchmarks.paper import train as training_module
from benchmarks.paper.measure import DENSE, Measured, load_measured, measure_all, save_measured
from benchmarks.paper.page import write_page
from benchmarks.paper.published import TABLES
from benchmarks.paper.recipes import CHOICES
from benchmarks.paper.train import adapter_file, jobs_of, owner_of, runs_in_order, train
from benchmarks.paper.trainings import MAIN, SMALL, TRAININGS, Training
from benchmarks.paper.workers import Job, run_jobs


def test_every_line_of_every_table_is_trained_and_nothing_else():
    wanted = {
        (line.model, recipe, line.row)
        for table in TABLES
        for line in table.lines
        for recipe in table.recipes
        if line.row != DENSE
    }
    trained = {(t.model, t.recipe, t.row) for t in TRAININGS}
    assert len(trained) == len(TRAININGS)
    assert wanted == trained


def test_tables_3_to_5_and_the_main_rows_have_three_seeds():
    ablations = {line.row for table in TABLES if table.name in ("table3", "table4", "table5") for line in table.lines}
    of_base = [t for t in TRAININGS if t.model == "fashion-mnist"]
    assert all(t.seeds == (0, 1, 2) for t in of_base if t.row in ablations)
    assert sum(t.row == MAIN for t in of_base) == 3


def test_gates_are_taken_from_a_row_of_the_same_recipe():
    for t in TRAININGS:
        if t.gates_of is not None:
            owners = [o for o in TRAININGS if (o.row, o.recipe, o.model) == (t.gates_of, t.recipe, t.model)]
            assert len(owners) == 1
            assert set(t.seeds) <= set(owners[0].seeds)


@pytest.mark.parametrize("static", [False, True])
def test_a_row_is_trained_from_the_gates_of_another_and_not_twice(tmp_path, monkeypatch, static):
    monkeypatch.setattr(training_module, "STEPS", {1: 1, 2: 1})
    monkeypatch.setattr(training_module, "BATCH", 4)
    monkeypatch.setattr(run, "CALIBRATION_IMAGES", 4)
    monkeypatch.setattr(
        training_module, "load_pretrained", lambda *_, **__: (make_tiny_var().vae_proxy[0], make_tiny_var())
    )
    monkeypatch.setattr(training_module, "fashion_mnist_source", lambda *_: sampled_source(make_tiny_var(), 8, 0))
    owner = next(t for t in TRAININGS if (t.row, t.recipe) == (MAIN, "best-uniform"))
    row = Training("other", ActVARConfig(token_rates=(0.5, 0.5)), ("9",), "best-uniform", gates_of=MAIN, static=static)
    path = train(row, 0, tmp_path, tmp_path, torch.device("cpu"))
    facts = describe_adapter(path)
    assert facts["config"] == (owner.config if static else row.config)
    assert facts["changed weights"] > 0
    gates = [adapter_file(tmp_path, t, 0, stage=1) for t in (owner, row)]
    times = [file.stat().st_mtime_ns for file in gates]
    train(row, 0, tmp_path, tmp_path, torch.device("cpu"))
    assert [file.stat().st_mtime_ns for file in gates] == times


def test_stage_1_is_made_once_and_before_all_that_need_it(tmp_path):
    runs = runs_in_order(TRAININGS)
    assert {seed for _, seed in runs[:39]} == {0, 1, 2}
    assert all(len(training.seeds) == 1 for training, _ in runs[39:])
    jobs = jobs_of(runs, tmp_path, tmp_path, torch.device("cpu"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.after) <= set(names[:place])
    assert sum(not job.after for job in jobs) == 3 * 3 + 3 + 2 + 1 + 6, (
        "own gates; of `dense fine-tuned` none are trained"
    )
    adapter_file(tmp_path, owner_of(runs[0][0]), 0, stage=1).touch()
    assert len(jobs_of(runs, tmp_path, tmp_path, torch.device("cpu"))) == len(jobs) - 1


def test_every_choice_of_the_recipe_waits_for_its_gates(tmp_path):
    pairs = [(choice, seed) for seed in (0, 1) for choice in CHOICES]
    jobs = recipes.jobs_of(pairs, tmp_path, tmp_path, torch.device("cpu"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == len(pairs) + 2 * 5
    for place, job in enumerate(jobs):
        assert all(name in names[:place] or name == "adapter-paper-stage1" for name in job.after)


def write(path, *after):
    assert all(other.exists() for other in after)
    with path.open("x"):
        return path.name


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_are_done_once_and_after_those_they_wait_for(tmp_path, processes):
    files = [tmp_path / name for name in "abcd"]
    after = {"a": "b", "b": "", "c": "ab", "d": ""}
    jobs = [
        Job(
            file.name,
            functools.partial(write, file, *(tmp_path / name for name in after[file.name])),
            (*after[file.name], "z"),
        )
        for file in files
    ]
    assert {(job.name, result) for job, result in run_jobs(jobs, processes, tmp_path)} == {(x, x) for x in "abcd"}
    with pytest.raises(FileExistsError):
        list(run_jobs(jobs[1:2], processes, tmp_path))
    waiting = [Job("a", int, ("b",)), Job("b", int, ("a",))]
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        list(run_jobs(waiting, processes, tmp_path))


def test_a_process_that_dies_ends_the_jobs_and_says_what_ran(tmp_path):
    with pytest.raises(RuntimeError, match=r"a process died.*workers.log: one"):
        list(run_jobs([Job("one", functools.partial(os._exit, 3))], 2, tmp_path))


def measured(row: str, seed: int, kl: float, recipe: str = "paper", **changes) -> Measured:
    made = Measured("fashion-mnist", recipe, row, 2, seed, 75, round(kl, 4), round(kl, 4), round(2 * kl, 4), 0)
    return dataclasses.replace(made, **changes)


def test_the_page_says_what_agrees_what_is_noise_and_what_is_missing(tmp_path):
    (tmp_path / "paper").mkdir()
    rows = [measured(DENSE, seed, 0.0, recipe="", stage=0, flops=100) for seed in (0, 1, 2)]
    rows += [measured(MAIN, seed, 0.10 + 0.001 * seed, fid=14.5, num=5000) for seed in (0, 1, 2)]
    rows += [measured("fixed tokens", seed, 0.20 + 0.002 * seed) for seed in (0, 1, 2)]
    rows += [measured("static weights", seed, (0.05, 0.1, 0.2)[seed], fid=15 + seed, num=5000) for seed in (0, 1, 2)]
    rows += [measured("early scales", 0, 0.05)]
    path = save_measured(rows, tmp_path / "paper" / "results.csv")
    assert load_measured(path) == rows
    page, *pictures = write_page(rows, tmp_path)
    text = page.read_text()
    assert (
        "dynamic tokens are better than fixed ones* (dynamic activating token against fixed token pruning; recipe "
        in text
    )
    assert "`paper`): **agrees** by KL, which differs by 0.101 ± 0.0025." in text, "one side has no FID"
    assert (
        "`paper`): **within noise** by KL, which differs by 0.0157 ± 0.19; **within noise** by FID, 1.5 ± 2.5." in text
    )
    assert "**disagrees, one seed** by KL" in text
    assert "not measured yet" in text
    assert "| 25.0% | 0.101 ± 0.0025 | 0.202 ± 0.005 | 14.5" in text
    assert {picture.stem for picture in pictures} >= {"table4", "table5", "table6"}


def test_rows_without_an_adapter_stay_and_those_with_one_are_measured_again(tmp_path, monkeypatch):
    dense = [measured(DENSE, 0, 0.0, recipe="", stage=0, num=500), measured(DENSE, 0, 0.0, "", stage=0, model=SMALL)]
    known = [dense[0], measured(MAIN, 0, 0.3), measured("fixed tokens", 1, 0.4), dense[1]]

    def measure(model, seeds, label, adapter, work, data, num, device):
        recipe, row, stage = label
        asked.append((model, row, num))
        return [measured(row, seed, 0.0 if row == DENSE else 0.2, recipe, stage=stage, model=model) for seed in seeds]

    monkeypatch.setattr(measure_module, "measure", measure)
    monkeypatch.setattr(measure_module, "_quality", lambda data, device: None)
    training = next(t for t in TRAININGS if (t.row, t.recipe, t.model) == (MAIN, "paper", "fashion-mnist"))
    for num, models in ((0, []), (500, [SMALL])):
        asked: list[tuple[str, str, int]] = []
        found = measure_all(tmp_path, tmp_path, num, torch.device("cpu"), 1, known)
        assert asked == [(model, DENSE, num) for model in models]
        assert [row for row in found if row.row != DENSE] == known[1:3]

    asked = []
    adapter_file(tmp_path, training, 0).touch()
    found = measure_all(tmp_path, tmp_path, 0, torch.device("cpu"), 1, known)
    assert asked == [("fashion-mnist", MAIN, 0)]
    assert found == [dense[0], measured(MAIN, 0, 0.2), known[2], dense[1]]
    assert load_measured(tmp_path / "results.csv") == found


def test_choices_of_the_recipe_have_different_names_and_end_in_best():
    names = [choice.name for choice in CHOICES]
    assert len(set(names)) == len(names)
    assert any("best" in name and choice.gates == "rates" for name, choice in zip(names, CHOICES, strict=True))
