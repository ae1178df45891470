"""`actvar distill --infinity`: both stages for prompts, with whole weights and with factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar
from actvar.cli import main, sample_infinity
from actvar.distill import run
from actvar.models.infinity import schedules
from actvar.patching.adapter import describe_adapter
from actvar.text import encoder as encoder_module

SMALL = ["--pn", "0.06M", "--aspect", "3:1", "--device", "cpu", "--prompt", "a cat", "--samples", "8", "--batch", "4"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """Stand for the text encoder, with a cache of its own, and let the smallest size have four scales."""
    made = StandIn()
    monkeypatch.setitem(schedules.SIZES, "0.06M", 4)
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(run, "CALIBRATION_IMAGES", 4)
    return made


@pytest.fixture
def files(tmp_path):
    tokenizer, infinity = tiny_infinity(text_maxlen=80)
    torch.save(infinity.state_dict(), tmp_path / "model.pth")
    torch.save(tokenizer.state_dict(), tmp_path / "tokenizer.pth")
    return ["--infinity", str(tmp_path / "model.pth"), "--tokenizer", str(tmp_path / "tokenizer.pth")]


def distill(files, out, stage, *options):
    arguments = ["distill", *files, *SMALL, "--stage", str(stage), "--out", str(out), "--epochs", "2", *options]
    main(arguments)
    return describe_adapter(out)


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_the_command_trains_both_stages_for_prompts(files, stand_in, tmp_path, recipe, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dogs\na house by the sea\n")
    given = ["--prompts", str(prompts), "--recipe", recipe]
    one, two, three = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three"))
    facts = distill(files, one, 1, *given, "--experts", "8")
    assert stand_in.prompts == ["a cat", "dogs", "a house by the sea"]
    assert facts["changed weights"] == 0
    facts = distill(files, two, 2, *given, "--adapter", str(one))
    assert facts["training"].items() >= {"stage": 2, "data": "none", "cfg": 4.0, "tau": 0.5, "guidance": 4.0}.items()
    assert (facts["rank"], facts["training"]["examples"], facts["training"]["steps"]) == (None, 8, 4)
    assert distill(files, three, 2, *given, "--adapter", str(one), "--lora", "2")["rank"] == 2
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 1
    tokens = np.load(next(tmp_path.glob("tokens-*.npy")))
    assert tokens.dtype == np.int16
    assert "wrote" in capsys.readouterr().out
    _, infinity = tiny_infinity(text_maxlen=80)
    actvar.load_adapter(infinity, three)
    assert infinity.actvar.config.num_experts == 8


def test_the_command_ends_guidance_and_resumes(files, stand_in, tmp_path):
    out = tmp_path / "late.safetensors"
    options = ["--recipe", "guided", "--guidance-until", "-2", "--lora", "2"]
    facts = distill(files, out, 2, *options)
    assert (facts["config"].guidance_until, facts["config"].weights_from) == (-2, -2)
    state = torch.load(tmp_path / "late.training" / "stage2.checkpoint.pt", weights_only=True)
    before = load_file(out)
    assert state["step"] == 4
    distill(files, out, 2, *options)
    after = load_file(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "late.training" / "settings.json").read_text())["lora"] == 2


def test_wrong_arguments_are_one_line_and_exit_code_2(files, stand_in, tmp_path, capsys):
    for options, message in (
        (["--data", "images"], "--data: expected none for a model of texts"),
        (["--skip-bad"], "--class-numbers, --skip-bad: expected a folder of images, got a model of texts"),
        (["--model", "fashion-mnist"], "--model is not for --infinity"),
        (["--batch", "16"], "in batches of 16"),
    ):
        with pytest.raises(SystemExit) as stopped:
            distill(files, tmp_path / "a.safetensors", 1, *options)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        main(["distill", "--model", "fashion-mnist", "--stage", "1", "--out", str(tmp_path / "b.safetensors"), *SMALL])
    assert "expected --infinity, the checkpoint of a model of texts" in capsys.readouterr().err
