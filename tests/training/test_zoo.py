from __future__ import annotations

import hashlib
import json
import shutil
import socket
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.helpers import write_idx

import actvar
from actvar import ActVARConfig, CheckpointError, load_pretrained
from actvar.baselines import magnitude_units, trained_static_pruning
from actvar.baselines.static_pruning import fix_experts
from actvar.distill import run
from actvar.distill.recipes import RECIPES
from actvar.evaluate.methods import methods_of
from actvar.patching.patch import patched_silently
from actvar.zoo import load_feature_network
from actvar.zoo.checksums import checked, save_checksums
from actvar.zoo.fashion_mnist.data import load_split, read_idx
from actvar.zoo.pretrained import WEIGHTS, bundled_adapters, weights_folder
from scripts.fashion_mnist import train as zoo_train
from scripts.fashion_mnist.adapters import STAGE2, STATIC, ship, train_adapter, train_static
from scripts.fashion_mnist.export import export
from scripts.fashion_mnist.presets import CONFIGS
from scripts.fashion_mnist.small import export_small, small_plan, train_small
from scripts.fashion_mnist.train import Build, train


def agreement(var, seed: int) -> float:
    """Share of 100 samples that the feature network puts into the wanted class."""
    labels = torch.arange(10).repeat(10)
    images = var.autoregressive_infer_cfg(100, labels, g_seed=seed, cfg=1.5)
    return (load_feature_network().logits(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("adapter", [None, "paper-stage1", "paper", "best"])
def test_the_bundled_model_draws_what_it_is_asked_for(adapter, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("a bundled model must load offline")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    vae, var = load_pretrained("fashion-mnist", adapter=adapter)
    assert var.vae_proxy[0] is vae
    stated = json.loads((WEIGHTS["fashion-mnist"] / "quality.json").read_text())[adapter or "dense"]["agreement"]
    standard_error = (stated * (1 - stated) / 100) ** 0.5
    assert agreement(var, seed=0) >= stated - 3 * standard_error, "three standard errors below the model card"


def test_the_bundled_adapter_is_the_papers_configuration():
    _, var = load_pretrained("fashion-mnist", adapter="paper")
    assert var.actvar.config == ActVARConfig()
    actvar.remove_patch(var)
    _, dense = load_pretrained("fashion-mnist")
    assert all(torch.equal(a, b) for a, b in zip(var.state_dict().values(), dense.state_dict().values(), strict=True))


def test_what_ships_is_half_precision_and_small():
    files = list(weights_folder("fashion-mnist").glob("*.safetensors"))
    expected = {"var", "vae", "features", "adapter-paper-stage1", "adapter-paper", "adapter-best"}
    expected |= {f"preset-{name}" for name in CONFIGS}
    names = {f.stem for f in files}
    assert names in (expected, expected | {f"baseline-{name}" for name in STATIC})
    assert sum(f.stat().st_size for f in files) < 50e6
    for file in files:
        assert {t.dtype for t in load_file(file).values()} <= {torch.float16, torch.int64, torch.int32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="imagenet"), "expected one of"),
        (dict(name="fashion-mnist", adapter="worst"), r"comes with \['best', 'paper', 'paper-stage1'\], got 'worst'"),
        (dict(name="fashion-mnist-small", preset="worst"), r"preset: .* comes with \['lossless'\], got 'worst'"),
    ],
)
def test_unknown_names_list_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(**arguments)


@pytest.fixture
def copied_weights(tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(WEIGHTS["fashion-mnist"], tmp_path / "weights")
    monkeypatch.setitem(WEIGHTS, "fashion-mnist", folder)
    return folder


@pytest.mark.parametrize("name", ["var", "vae", "adapter-paper", "features"])
def test_a_flipped_byte_is_refused_until_the_table_is_made_anew(copied_weights, name):
    def load():
        load_pretrained("fashion-mnist", adapter="paper")
        load_feature_network()

    load()
    path = copied_weights / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # the last bit of a weight: the file is still a good one
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=rf"{name}.safetensors: expected SHA-256 \w{{64}}.*found {hashlib.sha256(content).hexdigest()}",
    ):
        load()
    save_checksums(copied_weights)
    load()


def test_a_file_that_the_table_does_not_name_is_refused(copied_weights):
    shutil.copy(copied_weights / "adapter-paper.safetensors", copied_weights / "adapter-other.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter-other.safetensors: expected SHA-256 None"):
        load_pretrained("fashion-mnist", adapter="other")


def test_a_trained_baseline_is_a_method_of_the_model_and_no_adapter(copied_weights):
    for file in copied_weights.glob("baseline-*"):
        file.unlink()
    save_checksums(copied_weights)
    assert not [name for name in methods_of("fashion-mnist") if "trained" in name]
    _, var = load_pretrained("fashion-mnist")
    file = copied_weights / "baseline-static-magnitude.safetensors"
    with patched_silently(var, ActVARConfig(token_rates=(1.0, 1.0), ffn_rate=0.75), None):
        fix_experts(var, magnitude_units(var, 0.75))
        actvar.save_adapter(var, file)
    with pytest.raises(CheckpointError, match=r"baseline-static-magnitude.safetensors: expected SHA-256 None"):
        methods_of("fashion-mnist")
    save_checksums(copied_weights)
    known = methods_of("fashion-mnist")
    assert [name for name in known if "trained" in name] == ["static-magnitude-trained@0.75"]
    assert "static-magnitude@0.75" in known
    images = []
    for name in ("static-magnitude@0.75", "static-magnitude-trained@0.75"):  # whose weights are the model's own
        with known[name].applied(var):
            images.append(var.autoregressive_infer_cfg(2, 3, g_seed=0))
    torch.testing.assert_close(*images)
    assert bundled_adapters("fashion-mnist") == ["best", "paper", "paper-stage1"]
    with pytest.raises(ValueError, match="adapter: fashion-mnist comes with"):
        load_pretrained("fashion-mnist", adapter="static-magnitude")


def test_the_bundled_adapter_is_no_static_pruning():
    _, var = load_pretrained("fashion-mnist")
    best = weights_folder("fashion-mnist") / "adapter-best.safetensors"
    with (
        pytest.raises(ValueError, match=r"adapter-best.safetensors: expected an adapter of static pruning"),
        trained_static_pruning(var, best),
    ):
        pass


@pytest.fixture
def images_folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (128, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", (np.arange(128) % 10).astype(np.uint8))
    return folder


def test_images_are_padded_to_32_pixels_and_scaled(images_folder):
    images, labels = load_split(images_folder, "train")
    raw = read_idx(images_folder / "train-images-idx3-ubyte.gz")
    assert images.shape == (128, 1, 32, 32)
    torch.testing.assert_close(images[:, 0, 2:30, 2:30], raw / 255)
    assert images[:, :, :2].abs().sum() == 0
    assert labels.tolist() == [i % 10 for i in range(128)]


def test_missing_and_damaged_image_files_are_named(images_folder):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_split(images_folder.parent, "train")
    path = images_folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"promises shape \(128,\), the file holds 123 bytes"):
        load_split(images_folder, "train")
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="expected an idx file"):
        read_idx(path)


@pytest.mark.slow
def test_every_stage_runs_and_the_exported_files_load(images_folder, tmp_path, monkeypatch):
    stages = [field.name.removesuffix("_steps") for field in fields(Build) if field.name.endswith("_steps")]
    build = Build(images_folder, tmp_path / "work", **{f"{stage}_steps": 1 for stage in stages})
    monkeypatch.setattr(zoo_train, "DRAWN", 40)
    monkeypatch.setattr(zoo_train, "DRAWN_AT_ONCE", 20)
    train(build, processes=1)
    made = {path.name: path.stat().st_mtime_ns for path in build.work.iterdir()}
    assert {f"{stage}.csv" for stage in stages} | {"tokens.pt", "drawn.pt"} <= made.keys()
    train(build, processes=1)
    assert {path.name: path.stat().st_mtime_ns for path in build.work.iterdir()} == made

    export(build, tmp_path / "weights")
    assert {path.name for path in map(checked, (tmp_path / "weights").glob("*.safetensors"))} == {
        f"{name}.safetensors" for name in ("var", "vae", "features", "adapter-paper-stage1")
    }
    _, var = actvar.load_var(tmp_path / "weights" / "var.safetensors", tmp_path / "weights" / "vae.safetensors")
    with actvar.patched(var, ActVARConfig(), tmp_path / "weights" / "adapter-paper-stage1.safetensors"):
        assert var.autoregressive_infer_cfg(2, 3, g_seed=0).isfinite().all()

    monkeypatch.setattr(run, "CALIBRATION_IMAGES", 4)
    for name in STAGE2:
        adapter = train_adapter(name, tmp_path / "weights", build.data, build.work, seed=0, steps=1)
        ship(adapter, name, tmp_path / "weights")
        shipped = checked(tmp_path / "weights" / f"adapter-{name}.safetensors")
        with actvar.patched(var, actvar.read_adapter_config(shipped), shipped):
            assert var.autoregressive_infer_cfg(2, 3, g_seed=0).isfinite().all()

    for name in STATIC:
        trained = train_static(name, tmp_path / "weights", build.data, build.work, seed=0, steps=1)
        before, log = load_file(trained), trained.with_suffix(".training") / "stage2.csv"
        logged = log.read_bytes()
        assert train_static(name, tmp_path / "weights", build.data, build.work, seed=0, steps=1) == trained
        assert log.read_bytes() == logged, "finished, not trained again"
        assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(trained).items())
        ship(trained, name, tmp_path / "weights", "baseline")
        shipped = checked(tmp_path / "weights" / f"baseline-{name}.safetensors")
        facts = actvar.patching.adapter.describe_adapter(shipped)
        assert facts["dtypes"] == ["float16", "int32"]
        assert facts["changed weights"] > 0
        assert facts["training"]["recipe"] == asdict(RECIPES["best"]) | {"losses": ["output"]}
        with trained_static_pruning(var, shipped):
            assert var.autoregressive_infer_cfg(2, 3, g_seed=0).isfinite().all()


def test_the_small_model_is_trained_on_the_shipped_autoencoder_and_loads(images_folder, tmp_path, monkeypatch):
    plan = small_plan(tmp_path / "work", seed=0, steps=1)
    train_small(images_folder, plan)
    export_small(plan, tmp_path / "small")
    monkeypatch.setitem(WEIGHTS, "fashion-mnist-small", tmp_path / "small")
    vae, var = load_pretrained("fashion-mnist-small")
    assert (len(var.blocks), var.blocks[0].ffn.fc1.in_features) == (4, 128)
    assert var.vae_proxy[0] is vae
    assert var.autoregressive_infer_cfg(2, 3, g_seed=0).isfinite().all()
