from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import make_tiny_var

from actvar import ActVARConfig, Execution, apply_patch, save_adapter
from actvar.cli import main
from actvar.models.checkpoint import describe_checkpoint
from actvar.patching.adapter import describe_adapter


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


@pytest.mark.parametrize(("flag", "name"), [("--dense", "dense.png"), ("--cfg=2", "accelerated.png")])
def test_sample_writes_one_grid(files, tmp_path, flag, name):
    run(files, flag, "--labels", "0-3", "--dtype", "bf16", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def info(capsys, *arguments) -> dict[str, str]:
    """What `actvar info` prints: names with values, in one column each."""
    main(["info", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index(line.split(":", 1)[1].lstrip(), line.index(":")) for line in lines}) == 1
    assert not any(set("{}'") & set(line) for line in lines)
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_info_describes_checkpoints_adapters_and_the_installation(files, capsys):
    sides = " ".join(map(str, make_tiny_var().patch_nums))
    assert info(capsys, files / "var.pth").items() >= {"kind": "var", "patch_nums": sides, "values": "finite"}.items()
    vae = info(capsys, files / "vae.pth")
    assert vae.items() >= {"kind": "autoencoder", "share_quant_resi": "4", "key": "(top level)"}.items()
    adapter = info(capsys, files / "adapter.safetensors")
    assert adapter.items() >= {"config.num_experts": "8", "config.scales": "-2 -1", "values": "finite"}.items()
    assert info(capsys)["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["var.pth", "vae.pth", "adapter.safetensors", None])
def test_info_as_json_has_the_same_facts(files, capsys, name):
    main(["info", *([] if name is None else [str(files / name)]), "--json"])
    facts = json.loads(capsys.readouterr().out)
    if name is None:
        assert facts["torch"] == torch.__version__
    elif name.startswith("adapter"):
        described = describe_adapter(files / name)
        assert ActVARConfig(**facts.pop("config")) == described.pop("config")
        assert Execution(**facts.pop("execution")) == described.pop("execution")
        assert facts == json.loads(json.dumps(described))
    else:
        assert facts == describe_checkpoint(files / name)


def test_info_says_when_values_are_not_finite(files, tmp_path, capsys):
    state = torch.load(files / "vae.pth", weights_only=True)
    torch.save({name: tensor * float("nan") for name, tensor in state.items()}, tmp_path / "vae.pth")
    value = info(capsys, tmp_path / "vae.pth")["values"]
    assert value.startswith(f"NOT FINITE in {len(state) - 1} tensors: encoder.")
    tensors = load_file(files / "adapter.safetensors")
    tensors["blocks.0.selector.bias"].fill_(float("inf"))
    with safe_open(files / "adapter.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "adapter.safetensors", file.metadata())
    assert info(capsys, tmp_path / "adapter.safetensors")["values"] == "NOT FINITE in 1 tensors: blocks.0.selector.bias"


@pytest.fixture
def trainers_file(files, tmp_path):
    """One file with both models, as the public trainer saves it, and an average of the transformer's weights."""
    var, vae = (torch.load(files / f"{name}.pth", weights_only=True) for name in ("var", "vae"))
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": var, "vae_local": vae}, "ema": dict(var)}, path)
    return str(path)


def test_a_key_chooses_within_the_trainers_file(trainers_file, tmp_path, capsys):
    source = ["--var", trainers_file, "--vae", trainers_file]
    assert (
        info(capsys, trainers_file, "--key", "trainer.var_wo_ddp").items()
        >= {
            "key": "trainer.var_wo_ddp",
            "kind": "var",
        }.items()
    )
    main(["sample", *source, "--key", "ema", "--dense", "--labels", "0", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "dense.png").exists()
    for arguments in (["info", trainers_file], ["sample", *source, "--labels", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1)
        for fragment in ("`trainer.var_wo_ddp` (var)", "`ema` (var)", "--key"):
            assert fragment in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--var", "x.pth", "--vae", "y.pth"], "--labels: say which classes"),
        (["sample", "--var", "x.pth", "--vae", "y.pth", "--labels", "bag"], "--labels: expected class numbers"),
        (["inspect", "--var", "x.pth", "--vae", "y.pth", "--label", "bag"], "--label: expected class numbers"),
        (["sample", "--model", "fashion-mnist", "--labels", "1,hat"], "or names of actvar models, got '1,hat'"),
        (["sample", "--model", "fashion-mnist", "--num", "10", "--json", "a.json"], "--json: expected it without"),
        (["sample", "--model", "fashion-mnist", "--json", "/"], "--json: expected the name of a file"),
        (["sample", "--model", "nothing", "--labels", "0"], "invalid choice"),
        (["sample", "--labels", "0"], "--model, or --var"),
        (["sample", "--var", "x.pth", "--labels", "0"], "--var needs --vae"),
        (["sample", "--var", "x.pth", "--vae", "y.pth", "--labels", "0"], "x.pth"),
        (["sample", "--model", "fashion-mnist", "--labels", "0-"], "such as 0-9"),
        (["sample", "--model", "fashion-mnist", "--labels", "-3"], "expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "10"], "classes 0-9, got 10"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--per-class", "0"], "from 1 to 1000000"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--adapter", "none"], "comes with"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--dense", "--compare"], "--dense"),
        (["sample", "--model", "fashion-mnist", "--vae", "y.pth", "--labels", "0"], "--var needs --vae"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--device", "nowhere"], "--device"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--cfg", "nan"], "--cfg: expected a finite number"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-p", "7"], "--top-p: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-k", "-3"], "--top-k: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--top-k", "9999"], "512 tokens"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--out", __file__], "test_cli.py"),
        (
            ["sample", "--model", "fashion-mnist", "--labels", "0", "--device", "meta"],
            "--device: expected one with memory",
        ),
        (["sample", "--model", "fashion-mnist", "--labels", "0-99999999999999"], "a range of 1 to 1000000 classes"),
        (["sample", "--model", "fashion-mnist", "--labels", "1,5-3"], "got '5-3'"),
        (["sample", "--model", "fashion-mnist", "--labels", "9" * 5000], "--labels"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--seed", str(2**64)], "--seed: expected"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--cfg=-inf"], "--cfg: expected a finite number"),
        (["verify", "--model", "fashion-mnist", "--rates", "0.5", "0"], "--rates: expected a number in (0, 1]"),
        (["verify", "--model", "fashion-mnist", "--rates", "0.5", "nan", "1"], "--rates: expected"),
        (["verify", "--model", "fashion-mnist", "--rates", *["0.5"] * 9], "the model has 6 scales"),
        (["sample", "--model", "fashion-mnist", "--labels", "0", "--key", "ema"], "--key chooses"),
        (["info", __file__, "--key", "ema"], "expected a file name that ends in"),
        (["verify", "--model", "fashion-mnist", "--batch", "0"], "from 1 to 1000000"),
        (["verify", "--model", "fashion-mnist", "--json", f"{__file__}/a/verify.json"], "--json: expected a folder at"),
        (["verify", "--model", "fashion-mnist", "--json", "/"], "--json: expected the name of a file"),
        (["flops", "--model", "d16", "--rates", "0.5", "2"], "--rates: expected"),
        (["info", "/dev/null"], "expected a checkpoint file"),
        (["info", __file__], "expected a file name that ends in"),
        (["info", "missing.pth"], "missing.pth"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_checkpoint_without_an_adapter_is_compared_with_itself_accelerated(files, tmp_path, caplog, capsys):
    run(files, "--labels", "0", "--compare", "--repeats", "1", "--out", str(tmp_path))
    out = capsys.readouterr().out
    assert "; no adapter\n" in out
    assert "saved" not in out
    assert not [r.message for r in caplog.records if "untrained" in r.message]


def test_the_module_runs_as_a_program(files):
    done = subprocess.run(
        [sys.executable, "-m", "actvar", "info", str(files / "var.pth")], capture_output=True, text=True, check=True
    )
    assert "depth" in done.stdout
