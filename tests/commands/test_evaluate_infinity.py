"""`actvar evaluate --infinity`: what is measured against the dense images, and a run that goes on."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar
from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main, sample_infinity
from actvar.evaluate import bundled, lite0, lite0_quality
from actvar.evaluate.lite0 import Lite0
from actvar.evaluate.similarity import psnr, ssim
from actvar.evaluate.texts import MOST_PSNR
from actvar.models import scale_schedule
from actvar.models.infinity import schedules
from actvar.sampling.shards import Bulk, image_seed
from actvar.text import encoder as encoder_module
from actvar.utils.pictures import pixel_values
from actvar.zoo.fashion_mnist_text.architecture import DRAW

SCALES = 5
SMALL = ["--pn", "0.06M", "--aspect", "3:1"]
PROMPTS = ["a cat", "dogs"]


@pytest.fixture(autouse=True)
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schedules.SIZES, "0.06M", SCALES)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """Stand for the text encoder, with a cache of its own, and for the weights of Lite0."""
    made = StandIn()
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    torch.manual_seed(0)
    network = Lite0().eval().requires_grad_(False)
    monkeypatch.setattr(lite0, "load_lite0", lambda: network)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infinity")
    tokenizer, infinity = tiny_infinity()
    torch.save(infinity.state_dict(), folder / "model.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    save_adapter(apply_patch(infinity, ActVARConfig(num_experts=8)), folder / "mine.safetensors")
    return folder


def arguments(files: Path, folder: Path, *more: str) -> list[str]:
    model = ["--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth")]
    prompts = ["--prompts", str(files / "prompts.txt"), *SMALL, "--rounds", "1"]
    return ["evaluate", *model, *prompts, "--json", str(folder / "found.json"), *more]


def test_methods_are_measured_against_the_dense_images(files, tmp_path, capsys):
    adapter = f"adapter:{files / 'mine.safetensors'}"
    methods = f"dense,accelerated,fastvar,skip@2,unguided@2,skipvar,{adapter}"
    out = {name: tmp_path / f"found.{kind}" for name, kind in (("csv", "csv"), ("plot", "png"))}
    more = ["--methods", methods, "--num", "2", "--csv", str(out["csv"]), "--plot", str(out["plot"])]
    main(arguments(files, tmp_path, *more, "--picture", str(tmp_path / "rows.png")))
    found = json.loads((tmp_path / "found.json").read_text())
    entries = found["methods"]
    assert list(entries) == [
        *("dense", "accelerated", "fastvar", "fastvar@0.75", "fastvar@0.5"),
        *("skip@2", "unguided@2", "skipvar", "mine"),
    ]
    assert (found["settings"]["prompts"], found["settings"]["num"], found["settings"]["batch"]) == (PROMPTS, 2, 1)
    dense, skip = entries["dense"], entries["skip@2"]
    assert (dense["psnr"], dense["ssim"], dense["distance_lite0"]) == (MOST_PSNR, 1, 0)
    assert [entries["accelerated"]["psnr"] > 40, skip["psnr"] < 40, skip["distance_lite0"] > 0] == [True] * 3
    sides = list(dense["kl_drawn"])
    assert len(sides) == SCALES
    assert set(dense["kl_drawn"].values()) == {0}
    assert max(entries["accelerated"]["kl_drawn"].values()) < 1e-5
    assert [skip["kl_drawn"][side] is None for side in sides] == [False] * 3 + [True] * 2
    unguided = entries["unguided@2"]["kl_drawn"]
    assert [unguided[side] > 1e-4 for side in sides] == [False] * 3 + [True] * 2
    flops = [entries[name]["flops"] for name in ("dense", "fastvar@0.75", "unguided@2", "skip@2", "fastvar")]
    assert flops == sorted(flops, reverse=True)
    assert dense["flops"] == entries["accelerated"]["flops"]
    assert all(entry["seconds"] > 0 for entry in entries.values())
    with out["csv"].open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["method"] for row in rows] == list(entries)
    assert float(rows[-1]["psnr"]) == pytest.approx(entries["mine"]["psnr"])
    for path in (out["plot"], tmp_path / "rows.png"):
        with Image.open(path) as picture:
            assert picture.width > 300
    printed = capsys.readouterr().out
    assert "PSNR" in printed
    assert "FID" not in printed


def test_the_figures_are_those_of_the_images_of_the_same_seeds(files, tmp_path):
    main(arguments(files, tmp_path, "--methods", "skip@1", "--seed", "3", "--seeds", "2", "--num", "2", "--tau", "1"))
    found = json.loads((tmp_path / "found.json").read_text())["methods"]["skip@1"]
    stand_in = StandIn()
    _, infinity = actvar.load_infinity(files / "model.pth", files / "tokenizer.pth")
    texts = [stand_in.table[stand_in.tokenizer(prompt, "pt").input_ids[0]] for prompt in PROMPTS]
    schedule = scale_schedule(1 / 3, "0.06M")

    def drawn(seed: int) -> torch.Tensor:
        seeds = [image_seed(seed, image) for image in range(2)]
        images = infinity.sample(torch.cat(texts), list(map(len, texts)), schedule, g_seed=seeds, tau=1.0)
        return pixel_values(images) / 255

    dense = [drawn(seed) for seed in (3, 4)]
    with actvar.patched(infinity, ActVARConfig(token_rates=(1, 1), ffn_rate=1, scales_until=-1)):
        ours = [drawn(seed) for seed in (3, 4)]
    for of_seed, theirs, own in zip(found["by_seed"], dense, ours, strict=True):
        pairs = [(own[i : i + 1], theirs[i : i + 1]) for i in range(2)]
        assert of_seed["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 2, abs=0.05)
        assert of_seed["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 2, abs=1e-3)
    assert found["psnr"] == pytest.approx(sum(of_seed["psnr"] for of_seed in found["by_seed"]) / 2)
    assert math.isfinite(found["interval"]["psnr"])


def test_a_second_call_draws_nothing_but_the_timed_batches(files, tmp_path, monkeypatch):
    drawn, run = [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda *given: drawn.append(given[2]) or run(*given))
    call = arguments(files, tmp_path, "--methods", "dense,unguided@1", "--picture", str(tmp_path / "rows.png"))
    main(call)
    assert len(drawn) == 2 + 2 + 2 * 2  # the dense images, those of the other method, and the picture's
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "found.parts").glob("*.json")}
    main(call)
    assert len(drawn) == 8
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "found.parts").glob("*.json")} == before


def test_batches_leave_skipvar_out_and_one_image_the_distance(files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lite0_quality, "LITE0_BATCH", 1)
    one = ["--prompt", "bird"]
    model = ["--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth")]
    rest = [*SMALL, "--rounds", "1", "--json", str(tmp_path / "one.json"), "--methods", "skip@1"]
    main(["evaluate", *model, *one, *rest])
    assert "distance_lite0" not in json.loads((tmp_path / "one.json").read_text())["methods"]["skip@1"]
    main(arguments(files, tmp_path, "--methods", "accelerated", "--batch", "2"))
    assert "skipvar is left out: it decides image by image, expected a batch of 1, got 2" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "tome@0.5"], "expected all, adapter files or names among dense"),
        (["--num", "3"], "num: expected a multiple of the 2 prompts"),
        (["--npz-dir", "images"], "--npz-dir is not for models of texts"),
        (["--num", "2", "--model", "fashion-mnist"], "--model is not for --infinity"),
        (["--seeds", "2", "--seed", str(2**64 - 1)], "seed: expected an integer"),
    ],
)
def test_wrong_arguments_are_one_line(more, message, files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(files, tmp_path, *more))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_single_garments_of_the_bundled_model_are_judged_by_both_networks(tmp_path, monkeypatch, caplog):
    """FID stands beside the distances to the dense images; the judges see grey images of all methods."""
    seen = []

    def judge(images: torch.Tensor) -> dict[str, float]:
        seen.append(images.shape)
        return {"fid": float(len(seen)), "fid_lite0": 2.0}

    monkeypatch.setattr(
        bundled, "training_lite0_quality", lambda data, device: SimpleNamespace(network=lite0.load_lite0())
    )
    monkeypatch.setattr(bundled, "text_judges", lambda data, quality, device: [("both", bundled._of_grey(judge))])
    (tmp_path / "prompts.txt").write_text("a sandal\na dark coat", "utf-8")
    call = ["evaluate", "--model", "fashion-mnist-text", "--prompts", str(tmp_path / "prompts.txt"), "--batch", "10"]
    call += ["--methods", "dense,unguided@1", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    main([*call, "--num", "20", "--plot", str(tmp_path / "plot.png")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == "fashion-mnist-text"
    assert (found["settings"]["cfg"], found["settings"]["tau"]) == (DRAW["cfg"], DRAW["tau"])
    assert [entry["fid"] for entry in found["methods"].values()] == [1, 2]
    assert {"psnr", "ssim", "distance_lite0", "fid_lite0"} <= found["methods"]["unguided@1"].keys()
    assert seen == [(20, 1, 32, 32)] * 2
    (tmp_path / "prompts.txt").write_text("a sandal and a dress\na dark coat and a bag", "utf-8")
    main([*call, "--num", "2"])
    assert "fid" not in json.loads((tmp_path / "found.json").read_text())["methods"]["dense"]
    assert "FID is left out: expected at least 20 images of one garment each" in caplog.text


def test_a_picture_needs_a_model_of_texts(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", "fashion-mnist", "--picture", "rows.png"])
    assert "--picture: expected --infinity" in capsys.readouterr().err
