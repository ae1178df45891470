"""`actvar calibrate --infinity`: adapters and plans for a model that draws from texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar
from actvar.calibrate.times import SampleTimes, ScaleTimes
from actvar.cli import main, sample_infinity
from actvar.models.infinity import schedules
from actvar.text import default_prompts
from actvar.text import encoder as encoder_module

SMALL = ["--pn", "0.06M", "--aspect", "3:1", "--experts", "8", "--device", "cpu"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """Stand for the text encoder, with a cache of its own, and let the smallest size have four scales."""
    made = StandIn()
    monkeypatch.setitem(schedules.SIZES, "0.06M", 4)
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    return made


def calibrate(folder: Path, *arguments: str) -> None:
    tokenizer, infinity = tiny_infinity(text_maxlen=80)
    torch.save(infinity.state_dict(), folder / "model.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    files = ["--infinity", str(folder / "model.pth"), "--tokenizer", str(folder / "tokenizer.pth")]
    main(["calibrate", *files, *SMALL, "--out", str(folder / "adapter.safetensors"), *arguments])


def test_an_adapter_is_fitted_to_the_prompts_that_are_given(tmp_path, stand_in, capsys):
    calibrate(tmp_path, "--prompt", "a cat", "--prompt", "dogs", "--samples", "4", "--rates", "0.5", "0.75", "0.5")
    assert stand_in.prompts == ["a cat", "dogs"]
    facts = json.loads((tmp_path / "adapter.json").read_text())
    assert (facts["images"], facts["cfg"]) == (4, 4.0)
    assert facts["flops"]["chosen"] <= facts["flops"]["budget"]
    _, infinity = tiny_infinity(text_maxlen=80)
    actvar.load_adapter(infinity, tmp_path / "adapter.safetensors")
    assert infinity.actvar.config.num_experts == 8


def test_a_preset_is_a_divergence_in_proportion_to_that_of_the_uniform_distribution(tmp_path, stand_in, monkeypatch):
    def times(*_):
        shares = 3 * [[2.0, 1.6, 1.2]]
        scales = {(guided, scale): ScaleTimes(*shares) for guided in (True, False) for scale in range(1, 4)}
        return [SampleTimes(8.0, scales)]

    monkeypatch.setattr("actvar.calibrate.plan.measured_times", times)
    monkeypatch.setattr("actvar.calibrate.plan._measured", lambda _, plan, *__: (8.0, plan.seconds))
    options = ["--prompt", "a cat", "--levers", "tokens,experts", "--repeats", "1", "--batch", "1", "--samples", "4"]
    plans = {}
    for preset in ("lossless", "fastest"):
        calibrate(tmp_path, *options, "--preset", preset)
        plans[preset] = json.loads((tmp_path / "adapter.json").read_text())
    assert plans["lossless"]["kl"] == 0
    assert {rate for rates in plans["lossless"]["config"]["token_rates"] for rate in rates} == {1.0}
    met = [row for row in plans["fastest"]["curve"] if row["kl"] <= plans["fastest"]["kl"]]
    assert 0 < plans["fastest"]["kl"] < max(row["kl"] for row in plans["fastest"]["curve"])
    assert min(row["predicted_ms"] for row in met) < 8000


def test_without_prompts_it_is_fitted_to_those_that_come_with_the_package(tmp_path, stand_in):
    calibrate(tmp_path, "--samples", "4")
    assert tuple(stand_in.prompts) == default_prompts()
    assert len(set(default_prompts())) == 64


def test_classes_and_texts_are_not_mixed(tmp_path, stand_in, capsys):
    for arguments, message in (
        (["--model", "fashion-mnist", "--prompt", "a cat"], "--prompt: expected --infinity"),
        (["--infinity", "a.pth", "--model", "fashion-mnist"], "--model is not for --infinity"),
        (["--infinity", "a.pth"], "--infinity needs --tokenizer"),
    ):
        with pytest.raises(SystemExit):
            main(["calibrate", *arguments, "--out", str(tmp_path / "adapter.safetensors")])
        assert message in capsys.readouterr().err
