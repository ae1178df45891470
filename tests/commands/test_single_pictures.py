"""`actvar sample --format png`: a picture per image, of few and of many; defaults of labels and filters."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import ROOT, make_tiny_var

import actvar
from actvar.cli import main
from actvar.models import VAR
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk, read_images, sample_many
from actvar.utils.pictures import pixel_values

SMALL = ["sample", "--model", "fashion-mnist-small", "--dense"]
BULK = Bulk(Sampling(tuple(range(10)), top_k=20), 20, 8, "png")


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_image_is_a_grey_picture_of_its_own_size(tmp_path, capsys):
    main([*SMALL, "--labels", "bag,0-1", "--format", "png", "--out", str(tmp_path), "--json", str(tmp_path / "a.json")])
    _, var = actvar.load_pretrained("fashion-mnist-small")
    expected = pixel_values(Sampling((8, 0, 1)).run(var))[:, 0].numpy()
    files = [str(tmp_path / f"dense-{number:05d}.png") for number in range(3)]
    for file, image in zip(files, expected, strict=True):
        assert np.array_equal(pixels(file), image)
    facts = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert (facts["images"], facts["files"]) == (3, files)
    assert facts["summary"][0] in capsys.readouterr().out


def test_both_ways_of_a_comparison_have_pictures(tmp_path):
    command = ["sample", "--model", "fashion-mnist-small", "--labels", "1,2", "--preset", "lossless", "--compare"]
    main([*command, "--format", "png", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}-{number:05d}.png" for name in ("accelerated", "dense", "difference") for number in range(2)
    ]


def test_many_pictures_are_the_images_of_the_shards(tmp_path):
    many = [*SMALL, "--num", "20", "--batch", "8"]
    main([*many, "--format", "png", "--out", str(tmp_path / "png"), "--npz", str(tmp_path / "png.npz")])
    main([*many, "--out", str(tmp_path / "shards"), "--npz", str(tmp_path / "shards.npz")])
    names = {f"{number:05d}.png" for number in range(20)}
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"manifest.json", *names}
    sampling = Sampling(tuple(range(10)))
    images, labels = read_images(tmp_path / "png", Bulk(sampling, 20, 8, "png"))
    others, same = read_images(tmp_path / "shards", Bulk(sampling, 20, 8))
    assert np.array_equal(images, others)
    assert labels.tolist() == same.tolist() == [*range(10)] * 2
    assert np.array_equal(images[13, :, :, 0], pixels(tmp_path / "png" / "00013.png"))
    assert (tmp_path / "png.npz").read_bytes() == (tmp_path / "shards.npz").read_bytes()
    with Image.open(tmp_path / "png" / "00013.png") as picture:
        assert picture.info["label"] == "3"


def test_colour_pictures_come_back_as_they_were(tmp_path):
    var = make_tiny_var(image_channels=3)
    sample_many(var, BULK, tmp_path)
    images, _ = read_images(tmp_path, BULK)
    assert images.shape[3] == 3
    assert np.array_equal(images[8:16], BULK.run(var, 1))


def test_a_rerun_draws_the_batches_of_missing_and_damaged_pictures(tmp_path, monkeypatch):
    var = make_tiny_var()
    sample_many(var, BULK, tmp_path)
    before = contents(tmp_path)
    (tmp_path / "00001.png").unlink()
    (tmp_path / "00009.png").write_bytes(before["00009.png"][:-20])
    (tmp_path / ".00001.png.123").write_bytes(b"left by a kill")
    drawn, run = [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda self, var, shard: drawn.append(shard) or run(self, var, shard))
    sample_many(var, BULK, tmp_path)
    assert drawn == [0, 1]
    assert contents(tmp_path) == before
    (tmp_path / "00017.png").write_bytes(b"")
    with pytest.raises(ValueError, match="expected complete files of the images 16 to 19"):
        read_images(tmp_path, BULK)
    (tmp_path / "00017.png").write_bytes(before["00018.png"])
    with pytest.raises(ValueError, match="images 16 to 19"):
        read_images(tmp_path, BULK)


def test_another_format_and_pictures_of_somebody_are_refused(tmp_path):
    var = make_tiny_var()
    sample_many(var, BULK, tmp_path / "a")
    with pytest.raises(ValueError, match="format png there, safetensors here"):
        sample_many(var, Bulk(BULK.sampling, 20, 8), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "001.png").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"expected manifest\.json beside the images"):
        sample_many(var, BULK, tmp_path / "b")
    with pytest.raises(ValueError, match=r"format: expected one of \['safetensors', 'png'\], got 'jpg'"):
        Bulk(BULK.sampling, 20, 8, "jpg")


def test_two_processes_draw_the_pictures_of_one(tmp_path):
    main([*SMALL, "--num", "20", "--batch", "4", "--format", "png", "--out", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "actvar", *SMALL]
    command += ["--num", "20", "--batch", "4", "--format", "png", "--out", str(tmp_path / "two")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    one, two = (
        [pixels(path).astype(int) for path in sorted((tmp_path / name).glob("*.png"))] for name in ("one", "two")
    )
    assert len(one) == len(two) == 20
    assert max(abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1  # torchrun gives each one thread


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[list[int], dict]]:
    """Return the labels and the other arguments of each sample."""
    found, infer = [], VAR.autoregressive_infer_cfg

    def noted(self, count, labels, **how):
        found.append((labels.tolist(), how))
        return infer(self, count, labels, **how)

    monkeypatch.setattr(VAR, "autoregressive_infer_cfg", noted)
    return found


def test_a_bundled_model_draws_each_class_from_all_tokens_by_default(tmp_path, drawn):
    main([*SMALL, "--out", str(tmp_path)])
    ((labels, how),) = drawn
    assert labels == list(range(10))
    assert (how["top_k"], how["top_p"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], (64, 0.95)), (["--top-k", "0"], (0, 0.95)), (["--top-p", "0"], (64, 0.0)), (["--top-k", "9"], (9, 0.95))],
    ids=["default", "all tokens", "no share", "fewer tokens"],
)
def test_the_filters_of_the_demo_are_the_default_for_a_checkpoint(given, expected, tmp_path, drawn):
    """The demo keeps 900 tokens, and the tiny model has 64 altogether."""
    var = make_tiny_var()
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    source = ["--var", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]
    main(["sample", *source, "--dense", "--labels", "1", *given, "--out", str(tmp_path / "out")])
    ((_, how),) = drawn
    assert (how["top_k"], how["top_p"]) == expected
