"""Ways of sampling by `actvar sample`, their order, and where they write."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import make_tiny_var

import actvar
from actvar.cli import main
from actvar.config import DENSE
from actvar.reports.compare import compare
from actvar_kernels.cpu_backend import brgemm

MODEL = ["--model", "fashion-mnist"]
SMALL = ["--model", "fashion-mnist-small"]

needs_bytes = pytest.mark.skipif(not brgemm.runs(torch.int8), reason="no products of bytes here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> list[str]:
    """The options for a tiny model's checkpoints, which no adapter comes with."""
    folder = tmp_path_factory.mktemp("model")
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    return ["--var", str(folder / "var.pth"), "--vae", str(folder / "vae.pth")]


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def test_accelerate_draws_the_dense_images_on_the_kernels(checkpoint, tmp_path, caplog, patches):
    for way in ("--dense", "--accelerate"):
        main(["sample", *checkpoint, way, "--labels", "0-3", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accelerated.png", "dense.png"]
    assert abs(pixels(tmp_path / "accelerated.png") - pixels(tmp_path / "dense.png")).max() <= 1
    dense, (config, execution) = patches
    assert dense is None
    assert not config.is_sparse
    assert execution == actvar.Execution()
    assert caplog.records == []


def test_shards_of_the_accelerated_model_are_not_continued_by_the_dense_one(tmp_path, capsys):
    command = ["sample", *SMALL, "--num", "10", "--batch", "10", "--out", str(tmp_path)]
    main([*command, "--accelerate"])
    with pytest.raises(SystemExit):
        main([*command, "--dense"])
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["--accelerate", "--cfg=1"])
def test_options_of_execution_and_rates_reach_the_model(way, tmp_path, patches):
    options = ["--sampler", "fast", "--decoder-dtype", "bf16"]
    rates = [] if way == "--accelerate" else ["--rates", "0.25", "0.5", "0.75"]
    main(["sample", *MODEL, "--labels", "1", way, *options, *rates, "--out", str(tmp_path)])
    ((config, execution),) = patches
    assert execution == actvar.Execution(sampler="fast", decoder_dtype="bfloat16")
    if rates:
        assert (config.token_rates, config.ffn_rate) == ((0.25, 0.5), 0.75)


@needs_bytes
def test_weights_reach_the_model_and_the_summary(tmp_path, patches, capsys):
    main(["sample", *MODEL, "--labels", "1", "--weights", "int8", "--out", str(tmp_path)])
    assert [execution for _, execution in patches] == [actvar.Execution(weights="int8")]
    assert "products of the blocks in int8" in capsys.readouterr().out


def test_an_option_of_execution_keeps_what_the_adapter_recommends_else(tmp_path, patches):
    _, var = actvar.load_pretrained("fashion-mnist", adapter="best")
    file = tmp_path / "adapter.safetensors"
    actvar.save_adapter(var, file, execution=actvar.Execution(decoder_dtype="bfloat16"))
    for option in ([], ["--sampler", "fast"]):
        main(["sample", *MODEL, "--adapter", str(file), "--labels", "1", *option, "--out", str(tmp_path)])
    assert [execution for _, execution in patches] == [
        actvar.Execution(decoder_dtype="bfloat16"),
        actvar.Execution(sampler="fast", decoder_dtype="bfloat16"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerate", "--dense"], "argument --dense: not allowed with argument --accelerate"),
        (["--accelerate", "--compare"], "argument --compare: not allowed with argument --accelerate"),
        (["--accelerate", "--adapter", "best"], "leave it out for --adapter"),
        (["--dense", "--adapter", "best"], "leave it out for --adapter"),
        (["--accelerate", "--rates", "0.5", "0.5"], "--rates: expected neither --dense nor --accelerate"),
        (["--dense", "--rates", "0.5", "0.5"], "--rates: expected neither --dense nor --accelerate"),
        (["--dense", "--sampler", "fast"], "give --accelerate instead"),
        (["--dense", "--decoder-dtype", "bf16"], "give --accelerate instead"),
        (["--dense", "--weights", "int8"], "give --accelerate instead"),
        (["--weights", "int4"], "invalid choice: 'int4'"),
        (["--rates", "0.5", "0.5"], "run actvar calibrate, and give its file as --adapter"),
        (["--sampler", "slow"], "invalid choice: 'slow'"),
        (["--decoder-dtype", "fp32"], "invalid choice: 'fp32'"),
        (["--out", "new/x.png"], "got the file new/x.png; give new/x instead"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--var", "no.pth", "--vae", "no.pth", "--labels", "0", *arguments])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_there_and_named_before_anything_is_timed(checkpoint, tmp_path, capsys, monkeypatch):
    def checked(var, sampling, first, repeats):
        assert "wrote " in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"dense.png", "accelerated.png", "difference.png"}
        assert repeats == 1, "the default, so that the command ends soon"
        return compare(var, sampling, first, repeats)

    monkeypatch.setattr("actvar.cli.sample.compare", checked)
    main(["sample", *checkpoint, "--labels", "0", "--compare", "--out", str(tmp_path)])
    titles, seconds = capsys.readouterr().out.splitlines()[-7:-5]
    assert titles.split() == ["dense", "accelerated", "vs", "dense"], "no third column without an adapter"
    assert re.fullmatch(r"whole sample, ms +[\d.]+ +[\d.]+ +[\d.]+x", seconds)


def test_the_pictures_of_a_comparison_are_what_warms_up(tmp_path, patches):
    main(
        ["sample", *MODEL, "--adapter", "best", "--labels", "0", "--compare", "--repeats", "2", "--out", str(tmp_path)]
    )
    runs = [None if patch is None else patch[0] for patch in patches]
    assert runs[:2] == [None, DENSE]
    assert runs[2] not in runs[:2]
    assert runs == runs[:3] * 5, "one for the pictures, two that are timed, and two whose blocks are timed"


def test_folders_above_outputs_are_made(tmp_path):
    pictures, saved = tmp_path / "pictures" / "of", tmp_path / "saved" / "adapter.safetensors"
    main(["sample", *SMALL, "--labels", "0", "--dense", "--out", str(pictures)])
    _, var = actvar.load_pretrained("fashion-mnist", adapter="best")
    actvar.save_adapter(var, saved)
    for file in (pictures / "dense.png", saved):
        assert file.stat().st_size > 0


@pytest.mark.slow
def test_folders_above_adapters_are_made(tmp_path):
    calibrated, distilled = (tmp_path / name / "adapter.safetensors" for name in ("calibrated", "distilled"))
    main(["calibrate", *SMALL, "--samples", "4", "--uniform", "--out", str(calibrated)])
    how = ["--stage", "1", "--data", "none", "--samples", "10", "--batch", "10", "--epochs", "1"]
    main(["distill", *SMALL, *how, "--out", str(distilled)])
    for file in (calibrated, distilled):
        assert file.stat().st_size > 0
