"""The soak's parts, briefly, and that it finds and reports what must not happen."""

from __future__ import annotations

import pytest
import torch
from soak.__main__ import Part, soak
from soak.drawing import run_samples
from soak.killing import run_bulk_kills, run_evaluation_kills

from actvar.sampling.shards import Bulk


@pytest.mark.slow
def test_memory_is_flat_over_many_samples():
    assert run_samples(120, batch=10) == {"samples drawn": 120}


@pytest.mark.slow
def test_killed_bulk_sampling_goes_on_to_the_images_of_an_unbroken_run():
    assert run_bulk_kills(1, seed=1)["kills survived"] == 1


def test_killed_evaluation_goes_on_to_the_results_of_an_unbroken_run():
    assert run_evaluation_kills(1, seed=1) == {"kills survived": 1}


@pytest.mark.parametrize(
    ("kept", "message"), [(lambda: torch.zeros(1), "more tensors"), (lambda: b"x" * 2**23, "more bytes")]
)
def test_what_stays_behind_is_found(monkeypatch, kept, message):
    behind = []
    monkeypatch.setattr(Bulk, "run", lambda *_: behind.append(kept()))
    with pytest.raises(AssertionError, match=message):
        run_samples(400)


def test_the_summary_adds_up_and_names_what_was_found(capsys):
    def broken(seed):
        if seed == 1:
            raise AssertionError("it leaks")
        return {"patches": 4}

    parts = [Part("first", lambda seed: {"inputs": 500, "samples drawn": 3 + seed}), Part("second", broken, True)]
    assert soak(parts, 0)
    assert capsys.readouterr().out.startswith(
        "inputs tried: 500, faults injected: 0, kills survived: 0, samples drawn: 3, patched and unpatched: 4, "
        "violations: 0, leaks: 0 ("
    )
    assert not soak(parts, 0, seed=1)
    printed = capsys.readouterr()
    assert "patched and unpatched: 0, violations: 0, leaks: 1 (" in printed.out
    assert "second, seed 1: AssertionError('it leaks')" in printed.err
