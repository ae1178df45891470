"""Presets of a bundled model: loaded by name, sampled by `actvar sample`, and measured by `actvar evaluate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.helpers import sampled_tokens

import actvar
from actvar.cli import main
from actvar.config import DENSE
from actvar.evaluate.methods import chosen_methods, methods_of
from actvar.zoo.checksums import save_checksums
from actvar.zoo.pretrained import WEIGHTS, bundled_adapters, bundled_presets, load_pretrained, preset_path

NAME = "fashion-mnist"
MODEL = ["--model", NAME]
SPARSE = actvar.ActVARConfig(token_rates=(0.5, 0.5), ffn_rate=0.5)
CONFIGS = {
    "near": actvar.ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=1.0, guidance_until=5, weights_from=4),
    "fast": SPARSE,
}
EXECUTION = actvar.Execution(decoder_dtype="bfloat16")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """The bundled model's folder, with one adapter and with the presets of `CONFIGS`."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("var", "vae", "adapter-paper-stage1"):
        shutil.copy(WEIGHTS[NAME] / f"{name}.safetensors", folder)
    _, var = load_pretrained(NAME)
    for preset, config in CONFIGS.items():
        with actvar.patched(var, config):
            actvar.save_adapter(var, folder / f"preset-{preset}.safetensors", {"recipe": preset}, EXECUTION)
    save_checksums(folder)
    return folder


@pytest.fixture
def weights(shipped, monkeypatch) -> Path:
    monkeypatch.setitem(WEIGHTS, NAME, shipped)
    return shipped


def test_presets_are_listed_apart_from_adapters(weights):
    assert bundled_presets(NAME) == ["lossless", "fast", "near"]
    assert bundled_adapters(NAME) == ["paper-stage1"]
    assert preset_path(NAME, "near") == weights / "preset-near.safetensors"
    assert preset_path(NAME, "lossless") is None
    assert bundled_presets("fashion-mnist-small") == ["lossless"]


@pytest.mark.parametrize("execution", [None, actvar.Execution(sampler="fast")])
def test_a_preset_is_loaded_with_its_configuration_and_the_execution_given_or_recommended(weights, execution):
    for preset, config in CONFIGS.items():
        _, var = load_pretrained(NAME, preset=preset, execution=execution)
        assert (var.actvar.config, var.actvar.execution) == (config, execution or EXECUTION)
    _, var = load_pretrained(NAME, preset="lossless", execution=execution)
    assert (var.actvar.config, var.actvar.execution) == (DENSE, execution or actvar.Execution())


@pytest.mark.parametrize("name", [NAME, "fashion-mnist-small"])
def test_lossless_draws_the_tokens_of_the_dense_model(name):
    _, dense = load_pretrained(name)
    _, lossless = load_pretrained(name, preset="lossless")
    assert torch.equal(sampled_tokens(lossless), sampled_tokens(dense))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(preset="nearest"), r"preset: fashion-mnist comes with \['lossless', 'fast', 'near'\], got 'nearest'"),
        (dict(preset="paper-stage1"), r"preset: .*, got 'paper-stage1'"),
        (dict(adapter="near"), r"adapter: fashion-mnist comes with \['paper-stage1'\], got 'near'"),
        (dict(preset="near", adapter="paper-stage1"), "expected an adapter or a preset, got both"),
        (dict(execution=EXECUTION), "execution: expected an adapter or a preset"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_read(weights, arguments, message, monkeypatch):
    monkeypatch.setattr("actvar.zoo.pretrained.load_var", lambda *_args, **_kwargs: pytest.fail("the model was read"))
    with pytest.raises(ValueError, match=message):
        load_pretrained(NAME, **arguments)


def test_a_preset_that_the_table_does_not_name_is_refused(weights, monkeypatch, tmp_path):
    changed = shutil.copytree(weights, tmp_path / "changed")
    shutil.copy(changed / "preset-fast.safetensors", changed / "preset-near.safetensors")
    monkeypatch.setitem(WEIGHTS, NAME, changed)
    with pytest.raises(actvar.CheckpointError, match=r"preset-near.safetensors: expected SHA-256"):
        load_pretrained(NAME, preset="near")


@pytest.mark.parametrize(
    ("preset", "patch", "file"),
    [
        ("near", (CONFIGS["near"], EXECUTION), "actvar.png"),
        ("fast", (CONFIGS["fast"], EXECUTION), "actvar.png"),
        ("lossless", (DENSE, actvar.Execution()), "accelerated.png"),
    ],
)
def test_sample_draws_with_a_preset(weights, preset, patch, file, tmp_path, patches, caplog):
    main(["sample", *MODEL, "--preset", preset, "--labels", "1", "--out", str(tmp_path)])
    assert patches == [patch]
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert caplog.records == []


def test_an_option_of_execution_keeps_what_the_preset_recommends_else(weights, tmp_path, patches):
    main(["sample", *MODEL, "--preset", "near", "--sampler", "fast", "--labels", "1", "--out", str(tmp_path)])
    assert patches == [(CONFIGS["near"], actvar.Execution(sampler="fast", decoder_dtype="bfloat16"))]


@pytest.mark.parametrize("preset", ["lossless", "near", "fast"])
def test_compare_sets_a_preset_beside_the_dense_model(weights, preset, tmp_path, capsys):
    main(["sample", *MODEL, "--preset", preset, "--compare", "--labels", "1", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "whole sample, ms" in shown
    assert ("blocks of the active scales" in shown) == (preset == "fast"), "the others have no active scale"
    assert (tmp_path / "tokens.png").exists() == (preset == "fast")
    assert (tmp_path / "difference.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--adapter", "paper-stage1"], "leave out --adapter"),
        ([*MODEL, "--accelerate"], "leave out --accelerate"),
        ([*MODEL, "--dense"], "leave out --dense"),
        ([*MODEL, "--rates", "0.5", "0.5"], "leave out --rates"),
        (["--var", "no.pth", "--vae", "no.pth"], "presets belong to bundled models"),
        (["--var", "no.pth", "--vae", "no.pth"], "run actvar calibrate, and give its file as --adapter"),
    ],
)
def test_options_that_a_preset_takes_the_place_of_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *arguments, "--preset", "lossless", "--labels", "0", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["nearest", ""])
def test_an_unknown_preset_of_the_command_lists_those_that_exist(weights, preset, capsys):
    with pytest.raises(SystemExit):
        main(["sample", *MODEL, "--preset", preset, "--labels", "0"])
    assert f"comes with ['lossless', 'fast', 'near'], got {preset!r}" in capsys.readouterr().err


def test_each_file_of_a_preset_is_one_method_of_evaluate(weights):
    known = methods_of(NAME)
    own = [name for name in known if name.startswith("preset-") and not name.endswith("-int8")]
    assert own == ["preset-fast", "preset-near"]
    assert {"preset-fast", "preset-near"} <= {method.name for method in chosen_methods("all", known)}
    _, var = load_pretrained(NAME)
    with known["preset-near"].applied(var):
        assert (var.actvar.config, var.actvar.execution) == (CONFIGS["near"], EXECUTION)


def test_info_describes_a_preset_as_an_adapter(weights, capsys):
    main(["info", str(preset_path(NAME, "near")), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["training"] == {"recipe": "near"}
    assert (facts["config"]["guidance_until"], facts["config"]["weights_from"]) == (5, 4)
    assert facts["execution"]["decoder_dtype"] == "bfloat16"
