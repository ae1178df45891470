"""Adapters, checkpoints and image files that are damaged or lie are refused before anything changes."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import fuzz
from support.faults import expect_same_state, small_model, state_of

import actvar
from actvar import ActVARConfig, AdapterError, CheckpointError, load_adapter
from actvar.models.checkpoint import describe_checkpoint, load_var, read_tensors
from actvar.patching.adapter import gate_parameters
from actvar.patching.patch import patch_silently
from actvar.zoo.fashion_mnist.data import load_split, read_idx

NAN, INF = float("nan"), float("inf")


# Adapters


@pytest.fixture
def adapter(tmp_path):
    """A patched model and the file of another's gates."""
    path, other = tmp_path / "adapter.safetensors", small_model(1)
    patch_silently(other, ActVARConfig(num_experts=8))
    for parameter in gate_parameters(other).values():
        parameter.add_(1)
    actvar.save_adapter(other, path)
    var = small_model()
    patch_silently(var, ActVARConfig(num_experts=8))
    return var, path


def change_adapter(path, tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, old | metadata)


SIZES = dict(depth=2, width=64, hidden=256, patch_nums=[1, 2, 4])
BIAS = "blocks.1.router.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="[1]"), "sizes of a model"),
        (dict(model="null"), "sizes of a model"),
        (dict(model="[" * 50_000), "damaged"),
        (dict(model=json.dumps(SIZES | {"depth": "2"})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"depth": True})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"patch_nums": 3})), "made for a model with"),
        (dict(model=json.dumps(SIZES | {"patch_nums": ["1", 2, 4]})), "sizes that are integers"),
        (dict(model=json.dumps(SIZES | {"more": 3})), "made for a model with"),
        (dict(model=json.dumps(SIZES | {"width": 128})), "made for a model with"),
        (dict(config="[" * 50_000), "nested too deeply"),
        (dict(config='{"num_experts": 1' + "0" * 400 + "}"), "num_experts"),
        (dict(config='{"kv": ["all"]}'), "kv"),
        (dict(tensors={BIAS: torch.full((8,), 1e300, dtype=torch.float64)}), "finite values in torch.float32"),
        (dict(tensors={BIAS: torch.zeros(8).to(torch.float8_e4m3fn)}), "got torch.float8_e4m3fn"),
        (dict(tensors={BIAS: torch.zeros(8, dtype=torch.complex64)}), "got torch.complex64"),
        (dict(tensors={BIAS: torch.zeros(1, 8)}), r"expected shape \[8\]"),
        (dict(tensors={BIAS: torch.full((8,), -INF)}), "finite"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_adapter_that_lies_is_refused_and_the_gates_stay(adapter, change, message):
    var, path = adapter
    before = state_of(var)
    change_adapter(path, **change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(var, path)
    expect_same_state(var, before)


def test_an_adapter_that_overflows_in_the_models_precision_is_refused(adapter):
    var, path = adapter
    change_adapter(path, {BIAS: torch.full((8,), 1e6)})
    load_adapter(var, path)
    var.half()
    with pytest.raises(AdapterError, match=r"finite values in torch.float16"):
        load_adapter(var, path)


def test_gates_that_are_not_finite_are_not_saved(adapter):
    var, path = adapter
    content = path.read_bytes()
    var.blocks[1].actvar.selector.weight[0, 3] = NAN
    with pytest.raises(ValueError, match=r"blocks.1.selector.weight: expected finite values"):
        actvar.save_adapter(var, path)
    assert path.read_bytes() == content


def test_a_checkpoint_is_no_adapter_and_an_adapter_no_checkpoint(adapter, tmp_path):
    var, path = adapter
    checkpoint = tmp_path / "var.safetensors"
    save_file(var.state_dict(), checkpoint)
    with pytest.raises(AdapterError, match="expected an ActVAR adapter"):
        load_adapter(var, checkpoint)
    with pytest.raises(CheckpointError, match="expected"):
        load_var(path, path)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "var.pth"
    torch.save(small_model().state_dict(), path)
    return path


def test_a_zip_bomb_is_refused_before_it_unfolds(checkpoint):
    with zipfile.ZipFile(checkpoint) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in records.items():
            target.writestr(name, content + (b"\0" * 2**28 if name.endswith("data.pkl") else b""))
    assert checkpoint.stat().st_size < 2**21
    before = fuzz._peak_memory()
    with pytest.raises(CheckpointError, match="complete file") as caught:
        read_tensors(checkpoint)
    assert "compressed" in str(caught.value.__cause__)
    assert fuzz._peak_memory() - before < 2**26


def test_many_tensors_of_one_memory_are_refused(checkpoint):
    shared = torch.zeros(1000)
    torch.save({f"blocks.0.{i}": shared for i in range(100)}, checkpoint)
    with pytest.raises(CheckpointError, match="400000 bytes for its tensors together"):
        read_tensors(checkpoint)


def test_a_transformer_without_classes_is_refused(checkpoint):
    state = small_model().state_dict()
    torch.save(state | {"class_emb.weight": torch.zeros(1, 64)}, checkpoint)
    with pytest.raises(CheckpointError, match="one class or more"):
        describe_checkpoint(checkpoint)


def test_an_absurd_number_of_scales_takes_no_memory(tmp_path):
    path, vae = tmp_path / "vae.safetensors", small_model().vae_proxy[0]
    state = vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.zeros(500_000, 1)}
    save_file(state, path)
    before = fuzz._peak_memory()
    assert describe_checkpoint(path)["scales"] == 500_000
    assert fuzz._peak_memory() - before < 2**27


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:99", 3.5])
def test_a_device_that_cannot_be_used_is_named_before_anything_is_read(device):
    with pytest.raises((ValueError, TypeError), match=r"device|argument"):
        load_var("missing.pth", "missing.pth", device=device)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match="expected a checkpoint file"):
        read_tensors(tmp_path / "var.pth")


# Image files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an idx file"),
        (b"\0\0\x08", "expected an idx file"),
        (b"\0\0\x09\x01\0\0\0\x01a", "expected an idx file of unsigned bytes"),
        (b"\0\0\x08\x03\0\0\0\x01", "3 sizes in the header, the file ends"),
        (b"\0\0\x08\xff" + b"\xff" * 1020, "at most 1073741824 bytes"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "at most 1073741824 bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"promises shape \(5,\), the file holds 3 bytes"),
        (b"\0\0\x08\x01\0\0\0\x02abc", r"promises shape \(2,\), the file holds more bytes"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_that_lies_is_refused(content, message, suffix, tmp_path):
    path = tmp_path / f"images{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_damaged_and_endless_gzip_files_are_refused(tmp_path):
    path = tmp_path / "images.gz"
    good = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"abc")
    for content in (b"no gzip", good[:-9], good[:20] + b"\xff\xff" + good[22:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"gzip|promises|expected"):
            read_idx(path)
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"\0" * 2**28))
    before = fuzz._peak_memory()
    with pytest.raises(ValueError, match="holds more bytes"):
        read_idx(path)
    assert fuzz._peak_memory() - before < 2**25


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [((2, 28, 28), [0], "labels"), ((2, 20, 20), [0, 1], "28"), ((2, 28, 28), [0, 10], "from 0 to 9, got 10")],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, message, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *images) + bytes(np.prod(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels))
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path, "train")


# Files of any kind


def test_a_small_part_of_the_fuzz_finds_nothing():
    counts = fuzz.run_fuzz(250, seed=7)
    assert counts["inputs"] == 250
    assert counts["refused"] > 150
