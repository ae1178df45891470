"""`actvar evaluate` from end to end: figures, plots, images, and a run that goes on after it was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.helpers import make_tiny_var, write_idx
from torch.utils import cpp_extension

from actvar.cli import main
from actvar.sampling.shards import Bulk


@pytest.fixture
def images_folder(tmp_path, monkeypatch):
    """Write few images in place of Fashion-MNIST's, and name an empty cache."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (64, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", (np.arange(64) % 10).astype(np.uint8))
    compiled = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("actvar.evaluate.bundled.TEST_IMAGES", 8)
    return folder


@pytest.mark.slow
def test_the_command_measures_the_bundled_model(images_folder, tmp_path, capsys):
    file, plot = tmp_path / "found.json", tmp_path / "plot.png"
    arguments = ["evaluate", "--model", "fashion-mnist", "--methods", "dense,best,skip@1"]
    arguments += ["--num", "20", "--batch", "10", "--rounds", "1", "--seeds", "2", "--data", str(images_folder)]
    arguments += ["--json", str(file), "--plot", str(plot), "--csv", str(tmp_path / "found.csv")]
    arguments += ["--all-seeds", "dense,best"]
    main(arguments)
    found = json.loads(file.read_text())
    assert list(found["methods"]) == ["dense", "best", "skip@1"]
    for entry in found["methods"].values():
        assert {"fid", "is", "precision", "recall", "seconds", "flops", "kl", "interval"} <= entry.keys()
    dense, best, skip = found["methods"].values()
    assert [len(entry["by_seed"]) for entry in (dense, best, skip)] == [2, 2, 1]
    assert skip["interval"]["fid"] is None
    with (tmp_path / "found.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["method"] for row in rows] == list(found["methods"])
    assert float(rows[2]["fid_minus_dense"]) == pytest.approx(skip["minus_dense"]["fid"]["mean"])
    assert (rows[1]["seeds"], rows[2]["seeds"], rows[2]["fid_interval"], rows[2]["kl_8x8"]) == ("2", "1", "", "")
    assert dense["flops"] > best["flops"] > skip["flops"]
    assert dense["kl"]["8x8"] == 0 < best["kl"]["8x8"]
    assert skip["kl"]["8x8"] is None
    assert plot.exists()
    assert (tmp_path / "cache" / "actvar").is_dir()
    before = {path.name: path.stat().st_mtime_ns for path in file.with_suffix(".parts").iterdir()}
    main(arguments)
    assert {path.name: path.stat().st_mtime_ns for path in file.with_suffix(".parts").iterdir()} == before
    assert "skip@1" in capsys.readouterr().out


# A process that kills itself when it is about to draw the second batch of the second seed.
DIES = """
import os, signal, sys
from pathlib import Path
from actvar.sampling.shards import Bulk
from actvar.cli import main

run, parts = Bulk.run, Path(sys.argv[-1]).with_suffix(".parts")

def run_or_die(*arguments):
    if list(parts.glob("*-seed1-*/shard-*.safetensors")):
        os.kill(os.getpid(), signal.SIGKILL)
    return run(*arguments)

Bulk.run = run_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_figures(images_folder, tmp_path, monkeypatch):
    arguments = ["evaluate", "--model", "fashion-mnist", "--methods", "skip@2", "--num", "20", "--seeds", "2"]
    arguments += ["--batch", "5", "--rounds", "1", "--no-lite0", "--data", str(images_folder), "--json"]
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    done = subprocess.run(
        [sys.executable, "-c", DIES, *arguments, str(killed)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -signal.SIGKILL
    parts = killed.with_suffix(".parts")
    seed0, shard = next(parts.glob("*-seed0-*.json")), next(parts.glob("*-seed1-*/shard-00000.safetensors"))
    assert not killed.exists()
    before, drawn, run = seed0.read_bytes(), [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda *arguments: drawn.append(arguments[2]) or run(*arguments))
    main([*arguments, str(killed)])
    assert drawn == [1, 2, 3]
    assert seed0.read_bytes() == before
    assert not shard.parent.exists()
    main([*arguments, str(whole)])
    found = [json.loads(file.read_text())["methods"] for file in (killed, whole)]
    for entry in (*found[0].values(), *found[1].values()):
        del entry["seconds"], entry["seconds_of_batches"]
    assert found[0] == found[1]


def test_the_command_writes_images_of_other_models_for_openais_evaluator(tmp_path, capsys):
    var = make_tiny_var()
    save_file(var.state_dict(), tmp_path / "var.safetensors")
    save_file(var.vae_proxy[0].state_dict(), tmp_path / "vae.safetensors")
    source = ["--var", str(tmp_path / "var.safetensors"), "--vae", str(tmp_path / "vae.safetensors")]
    rest = ["--num", "20", "--batch", "10", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    main(["evaluate", *source, "--methods", "dense,unguided@1", *rest, "--npz-dir", str(tmp_path / "images")])
    for name in ("dense-seed0", "unguided@1-seed0"):
        with np.load(tmp_path / "images" / f"{name}.npz") as file:
            assert file["arr_0"].shape == (20, 10, 10, 3)
            assert np.bincount(file["arr_1"]).tolist() == [2] * 10
    assert json.loads((tmp_path / "found.json").read_text())["methods"]["dense"]["seconds"] > 0
    assert "ms / image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "fashion-mnist", "--methods", "tomm"], "expected all, adapter files or names among"),
        (
            ["--model", "fashion-mnist", "--methods", "dense", "--num", "21"],
            "num: expected a multiple of the 10 classes",
        ),
        (["--model", "fashion-mnist", "--json", f"{__file__}/found.json"], "--json: expected a folder at"),
        (
            ["--var", "a.pth", "--vae", "b.pth", "--plot", "plot.png"],
            "--plot: quality is measured of the bundled model",
        ),
        (
            ["--model", "fashion-mnist", "--methods", "dense", "--all-seeds", "best"],
            "--all-seeds: expected some of --methods, got best",
        ),
        ([], "give either --model"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys, images_folder, monkeypatch):
    monkeypatch.chdir(images_folder.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--data", str(images_folder), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("actvar evaluate: ")
    assert message in error
