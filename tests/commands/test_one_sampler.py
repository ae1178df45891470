"""All ways that are compared draw tokens by one sampler, and on a GPU by the fast one."""

from __future__ import annotations

import argparse

import pytest
import torch
from support.helpers import sample

from actvar import ActVARConfig, Execution, accelerate, apply_patch
from actvar.cli import sample as sample_command
from actvar.cli.options import sampler_of
from actvar.cli.sample import _execution
from actvar.config import DENSE
from actvar.evaluate.methods import Method
from actvar.evaluate.run import Evaluation, image_seconds
from actvar.patching.patch import patched_silently, unpatched
from actvar.reports.compare import all_ways, first_samples, save_comparison
from actvar.sampling.request import Sampling
from actvar.sampling.samplers import drawn_by
from actvar.utils.pictures import save_images

CONFIG = ActVARConfig(num_experts=8)
FAST = Execution(sampler="fast")


def options(**values) -> argparse.Namespace:
    return argparse.Namespace(**dict(sampler=None, decoder_dtype=None, weights=None, device="cpu") | values)


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ({}, None),
        ({"device": "cuda"}, "fast"),
        ({"device": "cuda:1"}, "fast"),
        ({"device": "cuda", "sampler": "torch"}, "torch"),
        ({"sampler": "fast"}, "fast"),
    ],
)
def test_the_fast_sampler_is_the_default_on_a_gpu(given, sampler):
    assert sampler_of(options(**given)) == sampler
    execution = _execution(options(**given), None)
    assert execution == (None if sampler is None else Execution(sampler=sampler))


def test_the_dense_model_draws_the_tokens_of_the_fast_sampler(tiny_var):
    dense = sample(tiny_var)
    accelerate(tiny_var, FAST)
    expected = sample(tiny_var)
    with unpatched(tiny_var), drawn_by(tiny_var, "fast"):
        torch.testing.assert_close(sample(tiny_var), expected)
    with drawn_by(tiny_var, "torch"):
        torch.testing.assert_close(sample(tiny_var), dense)
    assert tiny_var.actvar.execution == FAST
    with unpatched(tiny_var), drawn_by(tiny_var, None):
        assert torch.equal(sample(tiny_var), dense)
    assert "draw" not in vars(tiny_var)


def test_a_draw_of_the_callers_is_put_back(tiny_var):
    def own(*_):
        raise AssertionError("not by this")

    tiny_var.draw = own
    with drawn_by(tiny_var, "fast"):
        sample(tiny_var)
    assert tiny_var.draw is own


@pytest.mark.parametrize("sampler", ["torch", "fast"])
def test_dense_and_accelerated_images_that_are_compared_are_alike(tiny_var, sampler):
    apply_patch(tiny_var, CONFIG, Execution(sampler=sampler))
    ways = all_ways(tiny_var, lambda: sample(tiny_var))
    torch.testing.assert_close(ways["dense"](), ways["accelerated"]())


def test_the_dense_picture_of_a_comparison_is_drawn_by_the_sampler_of_the_other(tiny_var, tmp_path):
    sampling = Sampling((1, 2), top_k=20, seed=4)
    dense = {}
    for execution in (FAST, Execution()):
        (tmp_path / execution.sampler).mkdir()
        with patched_silently(tiny_var, CONFIG, None, execution):
            first = first_samples(tiny_var, sampling)
        dense[execution.sampler] = save_comparison(first, tmp_path / execution.sampler, 2, ["a", "b"])[0].read_bytes()
    (tmp_path / "expected").mkdir()
    with drawn_by(tiny_var, "fast"):
        (expected,) = save_images(sampling.run(tiny_var), tmp_path / "expected", "dense", 2, False)
    assert dense["fast"] == expected.read_bytes()
    assert dense["fast"] != dense["torch"]


def test_all_methods_of_an_evaluation_draw_by_one_sampler(tiny_var, monkeypatch):
    drawn, run = {}, Sampling.run

    def kept(self, var):
        drawn["actvar" if "actvar" in vars(var) else "dense"] = run(self, var)

    monkeypatch.setattr(Sampling, "run", kept)
    accelerated = Method("accelerated", lambda var: patched_silently(var, DENSE, None))
    image_seconds(tiny_var, [Method("dense", unpatched), accelerated], Evaluation(batch=2, rounds=1, sampler="fast"))
    torch.testing.assert_close(drawn["dense"], drawn["actvar"])
    with drawn_by(tiny_var, "fast"):
        assert torch.equal(drawn["dense"], run(Sampling((0, 1)), tiny_var))


def test_a_sampler_is_among_the_settings_that_images_follow_from():
    with pytest.raises(ValueError, match="sampler: expected one of"):
        Evaluation(sampler="slow")
    assert "sampler" not in Evaluation().draw(0)
    assert Evaluation(sampler="fast").draw(0)["sampler"] == "fast"


@pytest.mark.parametrize(("images", "says"), [(1, True), (60, False)])
def test_the_command_says_where_the_dense_model_is_faster_on_a_gpu(tiny_var, monkeypatch, images, says):
    apply_patch(tiny_var, CONFIG)
    assert not list(sample_command._faster_dense(tiny_var, images)), "nothing on a CPU"
    monkeypatch.setattr(sample_command, "is_on_gpu", lambda var: True)
    lines = list(sample_command._faster_dense(tiny_var, images))
    assert [line.endswith("takes less time here (--accelerate)") for line in lines] == [True] * says
    accelerate(tiny_var)
    assert not list(sample_command._faster_dense(tiny_var, images)), "it is the dense one"
