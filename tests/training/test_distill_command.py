from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.helpers import NUM_CLASSES, make_tiny_var, sample

from actvar import ActVARConfig, apply_patch, load_adapter, patched, read_adapter_config, remove_patch, save_adapter
from actvar.calibrate import calibrate
from actvar.cli import main
from actvar.distill import data, run
from actvar.distill.run import Distillation, distill
from actvar.evaluate.divergence import divergence_by_scale
from actvar.families import family_of
from actvar.patching.adapter import describe_adapter, gate_parameters
from actvar.utils.weight_override import tuned_parameters

CONFIG = ActVARConfig(num_experts=8)
SAMPLES = 48


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a tiny model, and gates for it."""
    folder = tmp_path_factory.mktemp("model")
    var = make_tiny_var()
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), folder / "vae.pth")
    save_adapter(apply_patch(var, CONFIG), folder / "gates.safetensors")
    return folder


def arguments(files, out, **changes):
    options = {"stage": 2, "data": "none", "samples": SAMPLES, "batch": 16, "epochs": 2, "lr": 1e-3} | changes
    if options["stage"] == 2:
        options.setdefault("adapter", files / "gates.safetensors")
    given = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return ["distill", "--var", str(files / "var.pth"), "--vae", str(files / "vae.pth"), "--out", str(out), *given]


def distilled(files, out, **changes):
    main(arguments(files, out, **changes))
    return load_file(out)


def test_stage_one_writes_gates_for_the_rates_asked_for(files, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    distilled(files, out, stage=1, rates="0.5 0.75 0.5", scales="-3 -1", experts=4)
    assert "wrote" in capsys.readouterr().out
    assert read_adapter_config(out) == ActVARConfig((-3, -1), (0.5, 0.75), 0.5, num_experts=4)
    facts = describe_adapter(out)
    assert facts["changed weights"] == 0
    assert facts["training"].items() >= {"stage": 1, "data": "none", "batch": 16, "lr": 1e-3, "steps": 6}.items()
    rows = list(csv.DictReader((tmp_path / "one.training" / "stage1.csv").open()))
    assert rows[-1].keys() == {"step", "loss", "cls", "router", "selector", "balance"}
    assert Image.open(tmp_path / "one.training" / "stage1.png").size[0] > 500


def test_the_best_recipe_calibrates_and_imitates_the_logits_with_muon(files, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CALIBRATION_IMAGES", 4)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    gates = distilled(files, one, stage=1, recipe="best", experts=8)
    var = make_tiny_var()
    report = calibrate(var, CONFIG, images=4, seed=0)
    assert read_adapter_config(one) == report.config
    assert report.config.num_blocks == 2
    assert all(torch.equal(gates[name], gate) for name, gate in gate_parameters(var).items())
    distilled(files, two, adapter=one, recipe="best", lr=2e-3)
    facts = describe_adapter(two)["training"]
    assert facts["recipe"]["losses"] == ["output"]
    assert facts["recipe"]["muon"]
    state = torch.load(tmp_path / "two.training" / "stage2.checkpoint.pt", weights_only=True)
    assert len(state["optimizers"]) == 2
    with torch.no_grad():
        remove_patch(var)
        assert divergence(var, two) < divergence(var, one)


def divergence(var, adapter) -> float:
    """KL to the dense logits on token maps of zeros, over all scales."""
    labels = torch.arange(8) % NUM_CLASSES
    inputs = family_of(var).teacher_input(var, labels, torch.zeros(8, var.L, dtype=torch.int64))
    with patched(var, read_adapter_config(adapter), adapter):
        return sum(divergence_by_scale(var, [(labels, inputs)]))


def test_stage_two_goes_on_from_stage_one_and_is_loaded_and_removed(files, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    gates = distilled(files, one, stage=1, experts=8)
    tensors = distilled(files, two, adapter=one, dtype="bf16", ema=0.9, accumulate=2)
    assert all(torch.equal(tensors[name], gate) for name, gate in gates.items())
    assert describe_adapter(two)["training"]["adapter"] == "one.safetensors"

    var = make_tiny_var()
    before, image = {name: tensor.clone() for name, tensor in var.state_dict().items()}, sample(var)
    load_adapter(apply_patch(var, read_adapter_config(two)), two)
    weights = tuned_parameters(var)
    assert len(weights) == len(tensors) - len(gates)
    assert all(torch.equal(p, tensors[f"weights.{name}"]) for name, p in weights.items())
    assert not torch.equal(weights["head.weight"], before["head.weight"])
    remove_patch(var)
    assert all(torch.equal(tensor, before[name]) for name, tensor in var.state_dict().items())
    assert torch.equal(sample(var), image)


@pytest.mark.parametrize("changes", [{"stage": 1}, {"ema": 0.9}, {"ema": 0.9, "lora": 4, "recipe": "best"}], ids=str)
def test_an_interrupted_training_goes_on_to_the_same_adapter(files, tmp_path, monkeypatch, changes):
    """Ctrl-C in the middle of the third step: it is finished, saved, and the same command goes on from there."""
    stage = changes.get("stage", 2)
    whole = distilled(files, tmp_path / "whole.safetensors", **changes)
    seen = []
    examples = data.examples

    def interrupting(*args):
        seen.append(args)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return examples(*args)

    monkeypatch.setattr("actvar.distill.run.examples", interrupting)
    out = tmp_path / "part.safetensors"
    with pytest.raises(SystemExit) as stopped:
        distilled(files, out, **changes)
    assert stopped.value.code == 130
    assert not out.exists()
    assert len(seen) == 3
    checkpoint = torch.load(tmp_path / "part.training" / f"stage{stage}.checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3
    part = distilled(files, out, **changes)
    assert len(seen) == 6
    assert part.keys() == whole.keys()
    assert all(torch.equal(part[name], whole[name]) for name in whole)
    logs = [tmp_path / f"{name}.training" / f"stage{stage}.csv" for name in ("whole", "part")]
    assert logs[0].read_text() == logs[1].read_text()
    assert distilled(files, out, **changes).keys() == whole.keys()
    assert len(seen) == 6


def test_a_training_begun_with_other_arguments_is_not_gone_on_with(files, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    distilled(files, out)
    with pytest.raises(SystemExit):
        distilled(files, out, lr=1e-4)
    assert "holds a training with lr 0.001, not 0.0001" in capsys.readouterr().err


def test_arguments_can_be_corrected_before_the_first_checkpoint(files, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(SystemExit):
        distilled(files, out, batch=15, accumulate=2)
    with pytest.raises(SystemExit):
        distilled(files, out, adapter="missing.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert len(distilled(files, out, epochs=1)) > 0


def test_accumulated_parts_give_the_adapter_of_the_whole_batch(files, tmp_path):
    def adapter(parts):
        vae_var = make_tiny_var()
        vae_var.cond_drop_rate = 0.0
        how = Distillation(2, epochs=1, batch=16, lr=1e-3, accumulate=parts)
        out = tmp_path / f"{parts}.safetensors"
        source = data.sampled_source(vae_var, SAMPLES, seed=0)
        distill(vae_var, CONFIG, files / "gates.safetensors", source, how, out)
        return load_file(out)

    whole, parts = adapter(1), adapter(4)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=5e-4, rtol=1e-3, msg=name)


def test_two_processes_of_torchrun_train_one_adapter(files, tmp_path):
    out = tmp_path / "two.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "actvar"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    given = arguments(files, out, samples=32, epochs=1)
    done = subprocess.run(command + given, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    var = make_tiny_var()
    load_adapter(apply_patch(var, CONFIG), out)
    assert not torch.equal(var.head.weight, make_tiny_var().head.weight)
    tokens = np.load(next(tmp_path.glob("tokens-*.npy")))
    alone = data.cached_tokens(data.sampled_source(make_tiny_var(), 32, seed=0), make_tiny_var(), tmp_path / "..")
    assert np.array_equal(tokens, alone.numpy())


def test_sampled_token_maps_are_those_the_images_are_decoded_from():
    var = make_tiny_var()
    labels = torch.tensor([1, 2])
    tokens = data.drawn_token_maps(var, labels, 3, data.GUIDANCE)
    assert tokens.shape == (2, var.L)
    image = var.autoregressive_infer_cfg(2, labels, g_seed=3, cfg=1.5)
    maps = tokens.split([side * side for side in var.patch_nums], dim=1)
    torch.testing.assert_close(var.vae_proxy[0].idxBl_to_img(maps) * 0.5 + 0.5, image, atol=1e-5, rtol=0)


def test_token_maps_are_made_once_and_an_interrupted_file_is_completed(tmp_path):
    var, calls = make_tiny_var(), []

    def tokens_of(start, stop):
        calls.append((start, stop))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.arange(start, stop).unsqueeze(1).expand(-1, var.L) % 64

    source = data.Source(torch.zeros(150, dtype=torch.int64), tokens_of, {"data": "test"})
    with pytest.raises(KeyboardInterrupt):
        data.cached_tokens(source, var, tmp_path)
    tokens = data.cached_tokens(source, var, tmp_path)
    assert calls == [(0, 64), (64, 128), (64, 128), (128, 150)]
    assert tokens.dtype == torch.int16
    assert torch.equal(tokens, (torch.arange(150) % 64).unsqueeze(1).expand(-1, var.L).short())
    assert torch.equal(data.cached_tokens(source, var, tmp_path), tokens)
    assert len(calls) == 4
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


@pytest.fixture
def image_folder(tmp_path):
    random = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for i, suffix in enumerate(("png", "JPEG")):
            Image.fromarray(random.integers(0, 256, (30 + i, 20, 3), dtype=np.uint8)).save(folder / f"{i}.{suffix}")
    (tmp_path / "images" / "class0" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_of_images_is_read_class_by_class(image_folder, files, tmp_path):
    var = make_tiny_var()
    source = data.source_of(str(image_folder), var.vae_proxy[0], var, samples=1, seed=0)
    assert source.conditions.tolist() == [label for label in range(NUM_CLASSES) for _ in range(2)]
    image = data.load_image(image_folder / "class3" / "1.JPEG", 10, 1)
    assert image.shape == (1, 10, 10)
    maps = var.vae_proxy[0].img_to_idxBl(image.unsqueeze(0) * 2 - 1)
    assert torch.equal(source.tokens_of(7, 8), torch.cat(maps, dim=1))
    distilled(files, tmp_path / "a.safetensors", data=image_folder, batch=10)
    labels = np.load(next(tmp_path.glob("tokens-*.npy")))
    assert labels.shape == (20, var.L)


def test_the_command_says_what_it_found_and_leaves_out_what_cannot_be_read(image_folder, files, tmp_path, capsys):
    (image_folder / "class2" / "0.png").write_bytes(b"broken")
    (image_folder / "class3" / "extra.gif").touch()
    out = tmp_path / "new" / "folder" / "a.safetensors"
    with pytest.raises(SystemExit) as stopped:
        distilled(files, out, data=image_folder, batch=19)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert "1 of 20 images cannot be read" in error
    assert "class2/0.png: expected an image" in error
    assert list(out.parent.glob("tokens-*")) == []
    distilled(files, out, data=image_folder, batch=19, device="cpu", **{"skip-bad": ""})
    found = "19 images in 10 classes, 2 skipped (1 .txt, 1 .gif), 1 left out that cannot be read"
    assert capsys.readouterr().out.splitlines()[:2] == ["device cpu", found]
    assert np.load(next(out.parent.glob("tokens-*.npy"))).shape[0] == 19


def test_the_command_takes_a_mapping_for_fewer_folders_than_classes(image_folder, files, tmp_path, capsys):
    for number in range(2, NUM_CLASSES):
        shutil.rmtree(image_folder / f"class{number}")
    with pytest.raises(SystemExit):
        distilled(files, tmp_path / "a.safetensors", data=image_folder, batch=4)
    assert "give --class-numbers FILE" in capsys.readouterr().err
    (tmp_path / "classes.json").write_text('{"class0": 9, "class1": 3}')
    distilled(
        files, tmp_path / "a.safetensors", data=image_folder, batch=4, **{"class-numbers": tmp_path / "classes.json"}
    )
    assert "4 images in 2 classes, 1 skipped (.txt)" in capsys.readouterr().out


def test_images_are_scaled_to_nine_eighths_and_cut_from_the_centre(tmp_path):
    stripes = np.zeros((64, 128), np.uint8)
    stripes[:, 64:] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    grey, colour = (data.load_image(tmp_path / "wide.png", 32, channels) for channels in (1, 3))
    assert grey.shape == (1, 32, 32)
    assert torch.equal(colour, grey.expand(3, -1, -1))
    assert (grey[:, :, :14] < 0.05).all()
    assert (grey[:, :, 18:] > 0.95).all()


def test_folders_that_cannot_be_used_are_named(image_folder, tmp_path):
    var = make_tiny_var()

    def source(folder):
        return data.source_of(str(folder), var.vae_proxy[0], var, samples=1, seed=0)

    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        source(tmp_path / "nowhere")
    (image_folder / "eleventh").mkdir()
    with pytest.raises(ValueError, match="each of the model's 10 classes"):
        source(image_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 2, "adapter": "missing.safetensors"}, "missing.safetensors"),
        ({"batch": 64}, "in batches of 64"),
        ({"batch": 15, "accumulate": 2}, "a multiple of 1 processes x 2 parts"),
        ({"epochs": 0}, "--epochs: expected a number above 0"),
        ({"ema": 1}, "--ema: expected"),
        ({"cfg": -0.5}, "--cfg: expected"),
        ({"lr": "nan"}, "--lr: expected"),
        ({"scales": "-1"}, "give --rates as well"),
        ({"rates": "0.5"}, "--rates: expected token rates"),
        ({"stage": 1, "rates": "1 1 1"}, "no selector or router to train"),
        ({"data": "nowhere"}, "no such folder"),
        ({"seed": 2**40}, "--seed: expected"),
        ({"data": "none", "skip-bad": ""}, "a folder of images for --class-numbers and --skip-bad"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(files, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        distilled(files, tmp_path / "a.safetensors", **changes)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_stage_two_without_an_adapter_and_missing_data_are_refused(files, tmp_path, capsys):
    source = [
        "--var",
        str(files / "var.pth"),
        "--vae",
        str(files / "vae.pth"),
        "--out",
        str(tmp_path / "a.safetensors"),
    ]
    for given, message in ((["--stage", "2", "--data", "none"], "adapter of stage 1"), (["--stage", "1"], "--data")):
        with pytest.raises(SystemExit):
            main(["distill", *source, *given])
        assert message in capsys.readouterr().err


def test_the_gates_of_stage_one_differ_from_the_untrained(files, tmp_path):
    tensors = distilled(files, tmp_path / "one.safetensors", stage=1, experts=8)
    untrained = gate_parameters(apply_patch(make_tiny_var(), CONFIG))
    assert all(not torch.equal(tensors[name], gate) for name, gate in untrained.items() if name.endswith("weight"))
