"""Many images: a seed per image, shards, resuming, several processes, and the file of OpenAI's evaluator."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.faults import full_disk
from support.helpers import make_tiny_var

from actvar import ActVARConfig, Execution, accelerate, apply_patch, load_pretrained
from actvar.cli import main
from actvar.sampling.request import Sampling
from actvar.sampling.shards import SEEDS, Bulk, image_seed, sample_many, write_npz

SAMPLING = Sampling(tuple(range(10)), top_k=20, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def exact_var():
    """In float64 rounding decides no draw."""
    var = make_tiny_var().double()
    var.vae_proxy[0].double()
    return var


def images_of(folder) -> np.ndarray:
    return np.concatenate([load_file(path)["images"] for path in sorted(folder.glob("shard-*"))])


def shards_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.mark.parametrize("execution", [None, Execution(), Execution(sampler="fast")], ids=str)
@pytest.mark.parametrize("sampling", [{"cfg": 1.5}, {"top_k": 9, "top_p": 0.9}, {"more_smooth": True}], ids=str)
def test_with_a_seed_per_image_each_is_that_of_a_batch_of_it_alone(execution, sampling):
    var = make_tiny_var().double()
    if execution is not None:
        apply_patch(var, ActVARConfig(num_experts=8), execution)
    seeds, labels = (5, 2**63, 0, 5), torch.tensor([1, 2, 3, 1])
    images = var.autoregressive_infer_cfg(4, labels, g_seed=seeds, **sampling)
    for image, label, seed in zip(images, labels, seeds, strict=True):
        alone = var.autoregressive_infer_cfg(1, label.view(1), g_seed=seed, **sampling)[0]
        torch.testing.assert_close(image, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(images[0], images[3], rtol=0, atol=1e-5)
    assert not torch.allclose(images[0], images[1], rtol=0, atol=1e-2)


def test_random_classes_follow_from_the_seeds_of_the_images(exact_var):
    images = exact_var.autoregressive_infer_cfg(3, None, g_seed=[7, 8, 9])
    alone = torch.cat([exact_var.autoregressive_infer_cfg(1, None, g_seed=seed) for seed in (7, 8, 9)])
    torch.testing.assert_close(images, alone, rtol=0, atol=1e-9)


def test_one_seed_per_image_or_one_for_all(tiny_var):
    with pytest.raises(ValueError, match=r"g_seed: expected an int, or one per image, 3 of them, got 2"):
        tiny_var.autoregressive_infer_cfg(3, 0, g_seed=[1, 2])


def test_no_two_images_share_a_seed_and_runs_differ():
    assert len({image_seed(0, image) for image in range(50_000)}) == 50_000
    assert len({image_seed(seed, 0) for seed in range(-500, 500)}) == 1000
    assert image_seed(1, SEEDS - 1) in range(SEEDS)


def test_every_class_has_as_many_images_and_its_own(exact_var, tmp_path):
    sample_many(exact_var, Bulk(SAMPLING, 40, 16), tmp_path)
    shards = [load_file(path) for path in sorted(tmp_path.glob("shard-*"))]
    labels = np.concatenate([shard["labels"] for shard in shards])
    assert [len(shard["images"]) for shard in shards] == [16, 16, 8]
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 4)
    image = exact_var.autoregressive_infer_cfg(
        1, int(labels[23]), g_seed=image_seed(3, 23), cfg=1.5, top_k=20, top_p=0.95
    )
    assert np.array_equal(images_of(tmp_path)[23], (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0))


def test_images_depend_on_neither_the_batch_nor_how_many_there_are(exact_var, tmp_path):
    for name, bulk in {"a": Bulk(SAMPLING, 20, 20), "b": Bulk(SAMPLING, 20, 3), "c": Bulk(SAMPLING, 10, 4)}.items():
        sample_many(exact_var, bulk, tmp_path / name)
    images = images_of(tmp_path / "a")
    assert np.array_equal(images, images_of(tmp_path / "b"))
    assert np.array_equal(images[:10], images_of(tmp_path / "c"))
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20


def test_in_float32_the_bundled_model_draws_the_same_images_in_batches_of_other_sizes(tmp_path):
    """The bound is on rounding: another draw would differ by much more."""
    _, var = load_pretrained("fashion-mnist", adapter="paper")
    for batch in (10, 3):
        sample_many(var, Bulk(Sampling(tuple(range(10))), 10, batch), tmp_path / str(batch))
    one, other = (images_of(tmp_path / str(batch)).astype(int) for batch in (10, 3))
    assert abs(one - other).max() <= 1


def test_a_rerun_draws_what_is_missing_or_damaged_and_nothing_else(exact_var, tmp_path, monkeypatch):
    bulk = Bulk(SAMPLING, 20, 4)
    sample_many(exact_var, bulk, tmp_path)
    before = shards_of(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "shard-00002.safetensors").write_bytes(before["shard-00002.safetensors"][:-1])
    (tmp_path / "shard-00004.safetensors").write_bytes(b"")
    (tmp_path / ".shard-00001.safetensors.123").write_bytes(b"left by a kill")
    drawn, run = [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda self, var, shard: drawn.append(shard) or run(self, var, shard))
    sample_many(exact_var, bulk, tmp_path)
    assert drawn == [1, 2, 4]
    assert shards_of(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", *before}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda var: (var, Bulk(replace(SAMPLING, seed=4), 20, 4)), "seed 3 there, 4 here"),
        (lambda var: (var, Bulk(SAMPLING, 20, 5)), "batch 4 there, 5 here"),
        (lambda var: (apply_patch(var, ActVARConfig(num_experts=8)), Bulk(SAMPLING, 20, 4)), "actvar None there"),
        (lambda var: (accelerate(var, Execution("fast")), Bulk(SAMPLING, 20, 4)), "execution None there, .*fast"),
        (lambda var: (var.float(), Bulk(SAMPLING, 20, 4)), "dtype float64 there, float32 here"),
        (lambda var: (changed(var), Bulk(SAMPLING, 20, 4)), "weights"),
    ],
    ids=["seed", "batch", "patch", "execution", "dtype", "weights"],
)
def test_a_folder_of_other_settings_is_refused_and_left_alone(exact_var, tmp_path, change, message):
    sample_many(exact_var, Bulk(SAMPLING, 20, 4), tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_tiny_var().double()
    other.vae_proxy[0].double()
    with pytest.raises(ValueError, match=message):
        sample_many(*change(other), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def changed(var):
    var.pos_start.data[0, 0, 0] += 1e-6
    return var


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"num": 4'])
def test_a_damaged_manifest_is_refused(exact_var, tmp_path, contents):
    (tmp_path / "manifest.json").write_text(contents)
    with pytest.raises(ValueError, match=r"manifest\.json: expected .*choose another folder"):
        sample_many(exact_var, Bulk(SAMPLING, 10), tmp_path)


def test_shards_without_a_manifest_are_refused(exact_var, tmp_path):
    (tmp_path / "shard-00000.safetensors").touch()
    with pytest.raises(ValueError, match=r"expected manifest\.json beside the images"):
        sample_many(exact_var, Bulk(SAMPLING, 10), tmp_path)


@pytest.mark.parametrize(("num", "batch"), [(0, 4), (15, 4), (10, 0)])
def test_numbers_that_do_not_fit_are_refused(num, batch):
    with pytest.raises(ValueError, match="expected"):
        Bulk(SAMPLING, num, batch)


def test_the_seed_of_many_images_is_one():
    with pytest.raises(TypeError, match=r"seed: expected an int.*got \(1, 2\)"):
        Bulk(replace(SAMPLING, seed=(1, 2)), 10)


@pytest.mark.parametrize(("num", "batch"), [(10, 3), (10, 5), (10, 20), (40, 7), (10**12, 50)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_images_of_a_process_are_counted_without_a_look_at_each_shard(num, batch, processes):
    bulk = Bulk(SAMPLING, num, batch)
    shards = [range(rank, bulk.shards, processes) for rank in range(processes)]
    counts = [bulk.count_of(mine) for mine in shards]
    assert sum(counts) == num
    if num < 100:
        assert counts == [sum(len(bulk.images_of(shard)) for shard in mine) for mine in shards]


def test_a_number_that_takes_years_begins_with_its_first_shard(exact_var, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for terminals
    looked_at, drawn = [], []

    def run(self, var, shard):
        drawn.append(shard)
        if shard == 1:
            raise KeyboardInterrupt
        return np.zeros((len(self.images_of(shard)), 4, 4, 1), np.uint8)

    monkeypatch.setattr(Bulk, "run", run)
    monkeypatch.setattr("actvar.sampling.shards._is_complete", lambda folder, bulk, shard: looked_at.append(shard))
    with pytest.raises(KeyboardInterrupt):
        sample_many(exact_var, Bulk(SAMPLING, 10**12, 4), tmp_path)
    assert (looked_at, drawn) == ([0, 1], [0, 1])
    assert "sampling:" in capsys.readouterr().err
    assert len(shards_of(tmp_path)) == 1


def evaluators_arrays(file) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and pixels the way guided-diffusion's evaluator reads an npz: header 1.0, C order, then a stream."""
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            with archive.open(name) as stream:
                assert np.lib.format.read_magic(stream) == (1, 0)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                assert not fortran
                arrays[name] = shape, dtype, stream.read()
    return arrays


@pytest.mark.parametrize("channels", [1, 3])
def test_the_npz_holds_every_image_once_shuffled_with_its_class(tmp_path, channels):
    var = make_tiny_var(image_channels=channels)
    bulk = Bulk(SAMPLING, 30, 7)
    sample_many(var, bulk, tmp_path / "a")
    write_npz(tmp_path / "a", bulk, tmp_path / "a.npz")
    arrays = evaluators_arrays(tmp_path / "a.npz")
    images = images_of(tmp_path / "a")
    shape, dtype, pixels = arrays["arr_0.npy"]
    assert shape == (30, *images.shape[1:3], 3)
    assert dtype == np.uint8
    found = np.frombuffer(pixels, np.uint8).reshape(shape)
    labels = np.load(tmp_path / "a.npz")["arr_1"]
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], found)
    expected = {np.broadcast_to(image, shape[1:]).tobytes(): index % 10 for index, image in enumerate(images)}
    assert len(expected) == 30
    assert {image.tobytes(): label for image, label in zip(found, labels.tolist(), strict=True)} == expected
    assert labels.tolist() != [index % 10 for index in range(30)]
    (tmp_path / "a" / "shard-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="expected complete files of the images 21 to 27"):
        write_npz(tmp_path / "a", bulk, tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == shape


def test_the_npz_is_written_with_one_image_in_memory(exact_var, tmp_path, monkeypatch):
    """Images of 1 MB in place of the model's."""
    monkeypatch.setattr(
        Bulk, "run", lambda self, var, shard: np.full((len(self.images_of(shard)), 600, 600, 3), shard, np.uint8)
    )
    bulk = Bulk(SAMPLING, 40, 4)
    sample_many(exact_var, bulk, tmp_path / "a")
    tracemalloc.start()
    try:
        write_npz(tmp_path / "a", bulk, tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6 < (tmp_path / "a.npz").stat().st_size


def test_the_command_writes_shards_and_the_npz(tmp_path, capsys):
    command = ["sample", "--model", "fashion-mnist", "--device", "cpu", "--num", "20", "--batch", "8"]
    command += ["--out", str(tmp_path / "a")]
    main([*command, "--npz", str(tmp_path / "a.npz")])
    assert capsys.readouterr().out == f"device cpu\n20 images in {tmp_path / 'a'}\nwrote {tmp_path / 'a.npz'}\n"
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (20, 32, 32, 3)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["actvar"]["num_experts"] == 16
    with pytest.raises(SystemExit):
        main([*command, "--dense"])
    assert "made with other settings: actvar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "15"], "multiple of the 10 classes"),
        (["--num", "0"], "at least 1"),
        (["--num", "10", "--compare"], "leave out --compare"),
        (["--num", "10", "--per-class", "2"], "--per-class"),
        (["--num", "10", "--npz", f"{__file__}/a.npz"], "--npz: expected a folder at"),
        (["--labels", "0", "--npz", "a.npz"], "belong to --num"),
        (["--labels", "0", "--batch", "4"], "belong to --num"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_fit_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", "fashion-mnist", "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_two_processes_draw_the_images_of_one_and_a_worker_that_dies_ends_the_job(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["sample", "--model", "fashion-mnist", "--num", "40", "--batch", "5", "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main([*command, str(one)])
    torch.set_num_threads(threads)

    def torchrun():
        # it takes --num for a short form of its own options unless -- comes first
        arguments = ["--nproc-per-node=2", "--master-port=0", "-m", "--", "actvar", *command, str(two)]
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    in_the_way = two / "shard-00005.safetensors"  # process 1 cannot write its third shard
    in_the_way.mkdir(parents=True)
    shutil.copy(one / "manifest.json", two)
    died = torchrun()
    assert died.returncode != 0
    reason = next(line for line in died.stderr.splitlines() if "actvar sample: " in line)
    assert in_the_way.name in reason
    assert "rank      : 1" in died.stderr
    in_the_way.rmdir()
    kept = {name: (two / name).stat().st_mtime_ns for name in shards_of(two)}
    assert {"shard-00001.safetensors", "shard-00003.safetensors"} <= kept.keys()
    resumed = torchrun()
    assert resumed.returncode == 0, resumed.stderr
    assert shards_of(two) == shards_of(one)
    assert {name: (two / name).stat().st_mtime_ns for name in kept} == kept


def test_on_a_full_disk_shards_and_npz_are_errors_that_leave_what_was_there(exact_var, tmp_path):
    bulk, folder, file = Bulk(SAMPLING, 20, 10), tmp_path / "images", tmp_path / "images.npz"
    sample_many(exact_var, bulk, folder)
    write_npz(folder, bulk, file)
    whole, npz = shards_of(folder), file.read_bytes()
    (folder / "shard-00001.safetensors").unlink()
    for room in (0, 100, len(whole["shard-00001.safetensors"]) - 1):
        with full_disk(room), pytest.raises(OSError, match=r"large|written"):
            sample_many(exact_var, bulk, folder)
        assert sorted(os.listdir(folder)) == ["manifest.json", "shard-00000.safetensors"]
    sample_many(exact_var, bulk, folder)
    assert shards_of(folder) == whole
    for room in (0, 100, len(npz) - 1):
        with full_disk(room), pytest.raises(OSError, match="large"):
            write_npz(folder, bulk, file)
        assert (file.read_bytes(), len(os.listdir(tmp_path))) == (npz, 2)
