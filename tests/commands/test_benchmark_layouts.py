"""`actvar sample --layout`: images lie where the public tools of GenEval, DPG-Bench and ImageReward look for them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar
from actvar.cli import main, sample_infinity
from actvar.models import scale_schedule
from actvar.models.infinity import schedules
from actvar.sampling.layouts import layout_of
from actvar.sampling.shards import Bulk, image_seed
from actvar.text import encoder as encoder_module
from actvar.utils.pictures import pixel_values

SIZE = ["--pn", "0.06M"]
PROMPTS = ["a bench", "two dogs"]
ENTRIES = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}]}, {"tag": "counting", "include": []}]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the smallest size have four scales, and stand for the text encoder, with a cache of its own."""
    monkeypatch.setitem(schedules.SIZES, "0.06M", 4)
    made = StandIn()
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infinity")
    tokenizer, infinity = tiny_infinity()
    torch.save(infinity.state_dict(), folder / "model.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    entries = [entry | {"prompt": prompt} for entry, prompt in zip(ENTRIES, PROMPTS, strict=True)]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n", "utf-8")
    (folder / "dpg").mkdir()
    for name, prompt in zip(("9", "10"), PROMPTS, strict=True):
        (folder / "dpg" / f"{name}.txt").write_text(f"{prompt}\n", "utf-8")
    named = [{"id": f"00569{i}-0057", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (folder / "image-reward.json").write_text(json.dumps(named), "utf-8")
    return folder


def sample(files: Path, out: Path, layout: str, prompts: str, *more: str) -> None:
    model = ["--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth")]
    rest = ["--layout", layout, "--prompts", str(files / prompts), "--out", str(out), "--dense", *more]
    main(["sample", *model, *SIZE, *rest])


def drawn(files: Path, each: int, seed: int = 0) -> np.ndarray:
    """Return the images of the model itself, all of a prompt behind each other."""
    stand_in = StandIn()
    _, infinity = actvar.load_infinity(files / "model.pth", files / "tokenizer.pth")
    texts = [stand_in.table[stand_in.tokenizer(prompt, "pt").input_ids[0]] for prompt in PROMPTS for _ in range(each)]
    seeds = [image_seed(seed, image) for image in range(len(texts))]
    images = infinity.sample(torch.cat(texts), list(map(len, texts)), scale_schedule(1, "0.06M"), g_seed=seeds)
    return pixel_values(images).permute(0, 2, 3, 1).numpy().astype(int)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_geneval_finds_four_images_of_each_prompt_beside_its_entry(files, tmp_path):
    """The tool goes through folders of digits, reads one JSON object, and takes names of digits with .png."""
    sample(files, tmp_path, "geneval", "geneval.jsonl", "--seed", "3")
    expected, found = drawn(files, 4, 3), {}
    for folder in filter(str.isdigit, os.listdir(tmp_path)):
        entry = json.loads((tmp_path / folder / "metadata.jsonl").read_text())
        names = sorted(os.listdir(tmp_path / folder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        found[entry["prompt"]] = [pixels(tmp_path / folder / "samples" / name) for name in names]
        assert entry.items() >= ENTRIES[PROMPTS.index(entry["prompt"])].items()
    assert list(map(len, found.values())) == [4, 4]
    for number, prompt in enumerate(PROMPTS):
        for ours, theirs in zip(found[prompt], expected[4 * number : 4 * number + 4], strict=True):
            assert abs(ours - theirs).max() <= 1


def test_dpg_bench_cuts_four_images_out_of_a_picture_named_like_the_prompts_file(files, tmp_path):
    sample(files, tmp_path, "dpg", "dpg", "--batch", "3")
    expected = drawn(files, 4)
    side = expected.shape[1]
    assert sorted(name.split(".")[0] for name in os.listdir(tmp_path / "images")) == ["10", "9"]
    for number, name in enumerate(("9", "10")):
        with Image.open(tmp_path / "images" / f"{name}.png") as picture:
            assert picture.size == (2 * side, 2 * side)
            corners = [(0, 0), (side, 0), (0, side), (side, side)]
            cuts = [np.asarray(picture.crop((x, y, x + side, y + side))).astype(int) for x, y in corners]
        for ours, theirs in zip(cuts, expected[4 * number : 4 * number + 4], strict=True):
            assert abs(ours - theirs).max() <= 1


def test_image_reward_finds_images_by_ids_and_by_the_list_of_files(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample(files, Path("out"), "image-reward", "image-reward.json", "--num", "6")
    expected, prompts = drawn(files, 3), json.loads((files / "image-reward.json").read_text())
    each = len(os.listdir("out/images")) // len(prompts)  # as ImageReward's own script counts
    assert each == 3
    for number, entry in enumerate(prompts):
        for k in range(each):
            assert abs(pixels(Path("out/images") / f"{entry['id']}_{k}.png") - expected[3 * number + k]).max() <= 1
    monkeypatch.chdir("/")
    listed = json.loads((tmp_path / "out" / "metadata.jsonl").read_text())  # as Infinity's script reads it
    assert [(entry["id"], entry["prompt"]) for entry in listed] == [(entry["id"], entry["prompt"]) for entry in prompts]
    assert [len(list(map(pixels, entry["gen_image_paths"]))) for entry in listed] == [3, 3]


@pytest.mark.parametrize(
    ("layout", "prompts", "image"),
    [
        ("geneval", "geneval.jsonl", "00001/samples/00002.png"),
        ("dpg", "dpg", "tiles/10-2.png"),
        ("image-reward", "image-reward.json", "images/005691-0057_7.png"),
    ],
)
def test_an_interrupted_run_draws_what_is_missing_and_clears_what_a_kill_left(
    layout, prompts, image, files, tmp_path, monkeypatch
):
    drawn_batches, run = [], Bulk.run
    monkeypatch.setattr(Bulk, "run", lambda *given: drawn_batches.append(given[2]) or run(*given))
    sample(files, tmp_path, layout, prompts)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    drawn_batches.clear()
    (tmp_path / image).write_bytes(before[tmp_path / image][:-50])
    left = (tmp_path / image).with_name(f".{Path(image).name}.123")
    left.write_bytes(b"")
    sample(files, tmp_path, layout, prompts)
    assert len(drawn_batches) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(SystemExit):
        sample(files, tmp_path, layout, prompts, "--seed", "1")


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("geneval", '{"prompt": "a"}\n{"tag": 1}', "expected objects with a text 'prompt'"),
        ("geneval", "a cat", "line 1: expected JSON"),
        ("geneval", "\n", "expected prompts, got none"),
        ("image-reward", '{"id": "1"}', "expected a JSON list"),
        ("image-reward", '[{"id": 1, "prompt": "a"}]', "expected objects with a text 'id'"),
        ("image-reward", '[{"id": "../a", "prompt": "a"}]', "expected names of files without a dot or slash"),
        ("image-reward", '[{"id": "a", "prompt": "a"}, {"id": "a", "prompt": "b"}]', "an id of its own"),
        ("dpg", "a cat", "expected a folder with a text file for each prompt"),
    ],
)
def test_prompts_of_another_form_are_refused(layout, content, message, tmp_path):
    (tmp_path / "prompts").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        layout_of(layout, tmp_path / "prompts", None)


@pytest.mark.parametrize(
    ("layout", "prompts", "more", "message"),
    [
        ("geneval", "geneval.jsonl", ["--format", "png"], "leave out --format"),
        ("geneval", "geneval.jsonl", ["--prompt", "cat"], "leave out --prompt"),
        ("geneval", "geneval.jsonl", ["--num", "7"], "num: expected a multiple of the 2 prompts, got 7"),
        ("geneval", "geneval.jsonl", ["--compare"], "--compare"),
        ("dpg", "dpg", ["--num", "6"], "num: expected 4 images of each prompt for DPG-Bench, got 3"),
        ("dpg", "dpg", ["--aspect", "3:1"], "--layout dpg: expected --aspect 1:1"),
    ],
)
def test_what_does_not_go_with_a_layout_is_refused(layout, prompts, more, message, files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample(files, tmp_path / "out", layout, prompts, *more)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", "--model", "fashion-mnist", "--layout", "geneval"])
    assert "expected --infinity, and the benchmark's prompts as --prompts" in capsys.readouterr().err
