from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import make_tiny_var
from PIL import Image

from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a tiny model and an adapter for it."""
    folder = tmp_path_factory.mktemp("model")
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    save_adapter(apply_patch(var, ActVARConfig(num_experts=8)), folder / "adapter.safetensors")
    return folder


def run(files, *arguments):
    main(["sample", "--var", str(files / "var.pth"), "--vae", str(files / "vae.pth"), *arguments])


def test_compare_prints_the_table_and_writes_the_pictures(files, tmp_path, capsys):
    adapter = str(files / "adapter.safetensors")
    run(
        files,
        "--adapter",
        adapter,
        "--classes",
        "3,5",
        "--per-class",
        "2",
        "--compare",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
    )
    out = capsys.readouterr().out
    for line in (
        "whole sample",
        "images per second",
        "blocks of the active scales",
        "GFLOP, formula",
        "GFLOP, counted",
    ):
        assert line in out
    formula, counted = (line for line in out.splitlines() if "GFLOP" in line)
    assert formula.split()[-4:] == counted.split()[-4:]
    sizes = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes.keys() == {"dense.png", "actvar.png", "difference.png", "tokens.png"}
    assert sizes["dense.png"] == sizes["actvar.png"] == sizes["difference.png"]


@pytest.mark.parametrize(("flag", "name"), [("--dense", "dense.png"), ("--cfg=2", "actvar.png")])
def test_sample_writes_one_grid(files, tmp_path, flag, name):
    run(files, flag, "--labels", "0-3", "--dtype", "bf16", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_info_describes_checkpoints_adapters_and_the_installation(files, capsys):
    for name, word in {
        "var.pth": "patch_nums",
        "vae.pth": "autoencoder",
        "adapter.safetensors": "num_experts=8",
    }.items():
        main(["info", str(files / name)])
        assert word in capsys.readouterr().out
    main(["info"])
    assert f"torch           {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--model", "fashion-mnist"], "--labels"),
        (["sample", "--model", "nothing", "--labels", "0"], "invalid choice"),
        (["sample", "--labels", "0"], "--model, or --var"),
        (["sample", "--var", "x.pth", "--labels", "0"], "--var needs --vae"),
        (["sample", "--var", "x.pth", "--vae", "y.pth", "--labels", "0"], "x.pth"),
        (["sample", "--model", "fashion-mnist", "--labels", "0-"], "such as 0-9"),
        (["sample", "--model", "fashion-mnist", "--labels", "-3"], "expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "10"], "classes 0-9, got 10"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--per-class", "0"], "at least 1"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--adapter", "none"], "comes with"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--dense", "--compare"], "--dense"),
        (["sample", "--model", "fashion-mnist", "--vae", "y.pth", "--labels", "0"], "--var needs --vae"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--device", "nowhere"], "--device"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--cfg", "nan"], "cfg: expected a finite number"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-p", "7"], "top_p: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-k", "-3"], "top_k: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-k", "9999"], "512 tokens"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--out", __file__], "test_cli.py"),
        (
            ["sample", "--model", "fashion-mnist", "--labels", "0", "--device", "meta"],
            "--device: expected one with memory",
        ),
        (["sample", "--model", "fashion-mnist", "--labels", "0-99999999999999"], "a range of 1 to 1000000 classes"),
        (["sample", "--model", "fashion-mnist", "--labels", "1,5-3"], "got '5-3'"),
        (["sample", "--model", "fashion-mnist", "--labels", "9" * 5000], "--labels"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--seed", str(2**64)], "g_seed: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--cfg=-inf"], "cfg: expected a finite number"),
        (["verify", "--model", "fashion-mnist", "--rates", "0.5", "0"], "ffn_rate: expected a number in (0, 1]"),
        (["verify", "--model", "fashion-mnist", "--rates", "0.5", "nan", "1"], "token_rates: expected"),
        (["verify", "--model", "fashion-mnist", "--rates", *["0.5"] * 9], "the model has 6 scales"),
        (["verify", "--model", "fashion-mnist", "--batch", "0"], "at least 1"),
        (["verify", "--model", "fashion-mnist", "--json", "missing/verify.json"], "a folder that exists"),
        (["verify", "--model", "fashion-mnist", "--json", "/"], "a folder that exists"),
        (["flops", "--model", "d16", "--rates", "0.5", "2"], "ffn_rate: expected"),
        (["info", "/dev/null"], "expected a checkpoint file"),
        (["info", __file__], "expected a file name that ends in"),
        (["info", "missing.pth"], "missing.pth"),
        ([], "command"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_untrained_comparison_says_so_once(files, tmp_path, caplog):
    run(files, "--labels", "0", "--compare", "--repeats", "1", "--out", str(tmp_path))
    (warning,) = [r.message for r in caplog.records if "untrained" in r.message]
    assert warning.endswith("run actvar calibrate first, then give its file as --adapter")


def test_the_module_runs_as_a_program(files):
    done = subprocess.run(
        [sys.executable, "-m", "actvar", "info", str(files / "var.pth")], capture_output=True, text=True, check=True
    )
    assert "depth" in done.stdout
