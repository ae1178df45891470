"""`actvar sample --infinity`: images of texts, few and many, comparisons, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn, save_tiny_t5

import actvar
from actvar import ActVARConfig, apply_patch, save_adapter
from actvar.cli import main, sample_infinity
from actvar.models import scale_schedule
from actvar.models.infinity import schedules
from actvar.reports.infinity import infinity_flops
from actvar.sampling.shards import image_seed
from actvar.text import encoder as encoder_module
from actvar.utils.pictures import pixel_values

SMALL = ["--pn", "0.06M", "--aspect", "3:1"]
SCHEDULE = scale_schedule(1 / 3, "0.06M")[:4]


@pytest.fixture(autouse=True)
def few_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the smallest size have four scales."""
    monkeypatch.setitem(schedules.SIZES, "0.06M", 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("infinity")
    tokenizer, infinity = tiny_infinity()
    torch.save(infinity.state_dict(), folder / "model.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """Stand for the text encoder, with a cache of its own."""
    made = StandIn()
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    return made


def sample(files: Path, *arguments: str) -> None:
    main(["sample", "--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth"), *arguments])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def drawn(files: Path, prompts: list[str], seeds: list[int], **arguments: float) -> np.ndarray:
    """Return the images of the model itself."""
    stand_in = StandIn()
    _, infinity = actvar.load_infinity(files / "model.pth", files / "tokenizer.pth")
    texts = [stand_in.table[stand_in.tokenizer(prompt, "pt").input_ids[0]] for prompt in prompts]
    images = infinity.sample(torch.cat(texts), list(map(len, texts)), SCHEDULE, g_seed=seeds, **arguments)
    return pixel_values(images).permute(0, 2, 3, 1).numpy()


def test_each_prompt_has_the_image_of_its_own(files, stand_in, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("  a cat \n\ndogs\n", "utf-8")
    prompts = ["--prompt", "bird", "--prompts", str(tmp_path / "prompts.txt")]
    sample(files, *prompts, *SMALL, "--dense", "--seed", "5", "--out", str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"dense-0000{i}.png" for i in range(3)]
    expected = drawn(files, ["bird", "a cat", "dogs"], [5, 5, 5])
    for number, image in enumerate(expected):
        assert np.array_equal(pixels(tmp_path / "out" / f"dense-{number:05d}.png"), image)
    printed = capsys.readouterr().out
    assert "images of 144x48 pixels, the template nearest to 3:1; 44 tokens in 4 scales" in printed
    assert "3 images in" in printed
    sample(files, *prompts, *SMALL, "--dense", "--out", str(tmp_path / "out"))
    assert stand_in.prompts == ["bird", "a cat", "dogs"]  # the second time they come from the cache


def test_the_numbers_of_the_draw_reach_the_model(files, stand_in, tmp_path):
    numbers = dict(cfg=2.0, tau=1.5, top_k=1, top_p=0.5)
    options = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sample(files, "--prompt", "cat", *SMALL, "--dense", *options, "--out", str(tmp_path / "out"))
    assert np.array_equal(pixels(tmp_path / "out" / "dense-00000.png"), drawn(files, ["cat"], [0], **numbers)[0])
    assert not np.array_equal(pixels(tmp_path / "out" / "dense-00000.png"), drawn(files, ["cat"], [0])[0])


def test_without_a_way_the_dense_images_are_drawn_on_the_kernels(files, stand_in, tmp_path, capsys):
    sample(files, "--prompt", "cat", *SMALL, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "facts.json"))
    image = pixels(tmp_path / "out" / "accelerated-00000.png")
    assert abs(image - drawn(files, ["cat"], [0])[0]).max() <= 1
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["images"] == 1
    assert "all tokens, experts and rows at every scale" in facts["summary"]
    steps = infinity_flops(tiny_infinity()[1], SCHEDULE, 1, 4)
    flops = sum(step.total - step.cross - step.text for step in steps)
    assert f"{flops / 1e9:.2f} G an image, 0.0% saved, without attention to the text" in facts["summary"][-1]


def test_compare_prints_the_table_and_writes_the_pictures(files, stand_in, tmp_path, capsys):
    infinity = actvar.load_infinity(files / "model.pth", files / "tokenizer.pth")[1]
    adapter = save_adapter(apply_patch(infinity, ActVARConfig(num_experts=8)), tmp_path / "adapter.safetensors")
    compare = ["--compare", "--adapter", str(tmp_path / "adapter.safetensors"), "--json", str(tmp_path / "facts.json")]
    sample(files, "--prompt", "cat", "--prompt", "a red dog", *SMALL, *compare, "--out", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    for line in ("whole sample", "blocks of the active scales", "PSNR to the dense images"):
        assert line in printed
    assert "2 images, cfg 4.0, fp32" in printed
    formula, counted = (line for line in printed.splitlines() if "GFLOP" in line)
    assert formula.split()[-4:] == counted.split()[-4:]
    names = {f"{name}-0000{i}.png" for name in ("dense", "actvar", "difference") for i in range(2)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "tokens.png"}
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["formula_flops"] == facts["counted_flops"]
    assert facts["formula_flops"]["actvar"] < facts["formula_flops"]["dense"]
    assert adapter is None


def test_many_images_of_the_prompts_resume(files, stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    many = ["--prompt", "cat", "--prompt", "dogs", *SMALL, "--dense", "--num", "6", "--seed", "3", "--out", str(out)]
    sample(files, *many, "--batch", "4", "--npz", str(tmp_path / "all.npz"))
    shards = [load_file(path) for path in sorted(out.glob("shard-*"))]
    assert [shard["labels"].tolist() for shard in shards] == [[0, 1, 0, 1], [0, 1]]
    seeds = [image_seed(3, number) for number in range(6)]
    expected = drawn(files, ["cat", "dogs"] * 3, seeds)
    assert abs(np.concatenate([shard["images"] for shard in shards]).astype(int) - expected).max() <= 1
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (6, *expected.shape[1:])
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["prompts"], manifest["num"], manifest["schedule"][-1]) == (["cat", "dogs"], 6, [1, 3, 9])
    (out / "shard-00001.safetensors").unlink()
    written = (out / "shard-00000.safetensors").stat().st_mtime_ns
    sample(files, *many, "--batch", "4")
    assert np.array_equal(load_file(out / "shard-00001.safetensors")["images"], shards[1]["images"])
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == written
    with pytest.raises(SystemExit):
        sample(files, *many, "--batch", "4", "--tau", "0.7")
    assert "tau 0.5 there, 0.7 here" in capsys.readouterr().err


def test_many_images_are_drawn_one_by_one_by_default_and_may_be_pngs(files, stand_in, tmp_path):
    sample(files, "--prompt", "cat", *SMALL, "--dense", "--num", "2", "--format", "png", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["batch"] == 1
    assert pixels(tmp_path / "out" / "00001.png").shape == (48, 144, 3)


def test_a_t5_of_transformers_encodes_the_prompts(files, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    t5 = save_tiny_t5(tmp_path / "t5")
    sample(files, "--prompt", "a cat", *SMALL, "--dense", "--text-encoder", str(t5), "--out", str(tmp_path / "out"))
    infinity = actvar.load_infinity(files / "model.pth", files / "tokenizer.pth")[1]
    image = infinity.sample(*actvar.TextEncoder(t5)(["a cat"]), SCHEDULE, g_seed=0)
    assert np.array_equal(pixels(tmp_path / "out" / "dense-00000.png"), pixel_values(image)[0].permute(1, 2, 0))


def test_inspect_shows_the_choices_on_maps_that_are_not_square(files, stand_in, tmp_path):
    out = tmp_path / "page.html"
    source = ["--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth"), "--quiet"]
    drawn = ["--prompt", "a <cat>", *SMALL, "--repeats", "1", "--device", "cpu"]
    main(["inspect", *source, *drawn, "--out", str(out)])
    text = out.read_text()
    assert "a &lt;cat&gt;" in text
    assert text.count("data:image/png") == 2 * len(SCHEDULE)
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert [(scale["height"], scale["width"]) for scale in data["scales"]] == [tuple(s[1:]) for s in SCHEDULE[-2:]]
    for scale in data["scales"]:
        tokens = scale["height"] * scale["width"]
        assert all(len(block["kept"]) == int(0.75 * tokens + 0.5) for block in scale["blocks"])
        assert max(max(block["kept"]) for block in scale["blocks"]) >= 0.75 * tokens


def refused(capsys: pytest.CaptureFixture[str], call, *arguments: str) -> str:
    """Return the one line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--infinity: say what to draw by --prompt TEXT, or by --prompts FILE"),
        (["--prompt", "cat", "--labels", "0"], "--labels is not for --infinity"),
        (["--prompt", "cat", "--per-class", "2"], "--per-class is not for --infinity"),
        (["--prompt", "cat", "--preset", "near"], "--preset is not for --infinity"),
        (["--prompt", "cat", "--model", "fashion-mnist"], "--model is not for --infinity"),
        (["--prompt", "cat", "--vae", "no.pth"], "--vae is not for --infinity"),
        (["--prompt", "cat", "--pn", "4M"], "--pn: invalid choice: '4M'"),
        (["--prompt", "cat", "--aspect", "16x9"], "expected width and height such as 16:9, got '16x9'"),
        (["--prompt", "cat", "--tau", "0"], "--tau: expected numbers above 0"),
        (["--prompt", "cat", "--cfg", "nan"], "--cfg"),
        (["--prompt", "cat", "--top-p", "2"], "--top-p"),
        (["--prompt", "cat", "--seed", str(2**64)], "--seed"),
        (["--prompts", "no.txt"], "No such file or directory: 'no.txt'"),
        (["--prompt", "cat", "--num", "3", "--compare"], "leave out --compare"),
        (["--prompt", "cat", "--batch", "3"], "--batch and --npz belong to --num"),
        (["--prompt", "cat", "--rates", "0.5", "0.5"], "run actvar calibrate, and give its file as --adapter"),
        (["--prompt", "cat"], "no.pth: no such file"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(
    arguments, message, stand_in, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--infinity", "no.pth", "--tokenizer", "no.pth", "--quiet", *arguments]
    assert message in refused(capsys, lambda: main(command))
    assert list(tmp_path.iterdir()) == []
    assert stand_in.prompts == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--infinity", "no.pth", "--prompt", "cat"], "--infinity needs --tokenizer"),
        (["--prompt", "cat"], "--prompt: expected --infinity, the checkpoint of a model of texts, or --model"),
        (["--model", "fashion-mnist", "--pn", "1M"], "--pn: expected --infinity"),
        (["--model", "fashion-mnist", "--tau", "1"], "--tau: expected --infinity"),
        (["--var", "no.pth", "--vae", "no.pth", "--tokenizer", "no.pth"], "--tokenizer: expected --infinity"),
        (["--labels", "0"], "give either --model, or --var with --vae, or --infinity with --tokenizer"),
    ],
)
def test_options_of_texts_need_the_checkpoints(arguments, message, capsys):
    assert message in refused(capsys, lambda: main(["sample", *arguments]))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "an empty file"), (b"\n \n", "an empty file"), (b"\xff", "UTF-8")]
)
def test_a_file_without_prompts_is_refused(content, message, files, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert message in refused(capsys, lambda: sample(files, "--prompts", str(tmp_path / "prompts.txt")))


@pytest.mark.parametrize("damage", ["swapped", "truncated", "another tokenizer", "no weights"])
def test_wrong_files_are_refused_before_prompts_are_encoded(damage, files, stand_in, tmp_path, capsys):
    model, tokenizer = files / "model.pth", files / "tokenizer.pth"
    message = "expected an Infinity transformer"
    if damage == "swapped":
        model, tokenizer = tokenizer, model
    elif damage == "truncated":
        model = tmp_path / "model.pth"
        model.write_bytes((files / "model.pth").read_bytes()[:-1000])
        message = "expected a complete file"
    elif damage == "another tokenizer":
        tokenizer = tmp_path / "tokenizer.pth"
        torch.save(tiny_infinity(bits=5)[0].state_dict(), tokenizer)
        message = "expected a tokenizer of 4 bits"
    else:
        model = tmp_path / "model.pth"
        torch.save({"epoch": 3}, model)
        message = "expected a state dict"
    command = ["sample", "--infinity", str(model), "--tokenizer", str(tokenizer), "--prompt", "cat"]
    assert message in refused(capsys, lambda: main(command))
    assert stand_in.prompts == []


def test_a_prompt_that_is_too_long_is_named(files, stand_in, capsys):
    error = refused(capsys, lambda: sample(files, "--prompt", "cat", "--prompt", "a very long prompt"))
    assert "--prompt: expected at most 12 tokens, got 19; shorten 'a very long prompt'" in error


def test_features_of_another_encoder_are_refused(files, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: StandIn(channels=64).loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path)
    error = refused(capsys, lambda: sample(files, "--prompt", "cat", "--text-encoder", "small"))
    assert "--text-encoder: expected features of 128 channels, as the model reads them, got 64 by small" in error


def test_without_transformers_the_extra_is_named(files, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encoder_module, "is_installed", lambda: False)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path)
    assert "pip install actvar[text]" in refused(capsys, lambda: sample(files, "--prompt", "cat"))


def test_what_needs_classes_refuses_a_model_of_texts():
    tokenizer, infinity = tiny_infinity()
    calls = (
        lambda: actvar.Sampler(tokenizer, infinity),
        lambda: actvar.calibrate.calibrate(infinity, images=4),
        lambda: actvar.distill.data.sampled_source(infinity, 4, 0),
    )
    for call in calls:
        with pytest.raises(TypeError, match="expected a model that draws from classes, such as VAR, got Infinity"):
            call()


def test_a_comparison_draws_all_ways_by_one_sampler(files, stand_in, tmp_path):
    options = ["--compare", "--sampler", "fast", "--json", str(tmp_path / "facts.json"), "--out", str(tmp_path / "out")]
    sample(files, "--prompt", "cat", *SMALL, *options)
    assert (
        abs(pixels(tmp_path / "out" / "dense-00000.png") - pixels(tmp_path / "out" / "accelerated-00000.png")).max()
        <= 1
    )
    sample(files, "--prompt", "cat", *SMALL, "--dense", "--out", str(tmp_path / "torch"))
    torchs, fast = (pixels(tmp_path / folder / "dense-00000.png") for folder in ("torch", "out"))
    assert abs(torchs - fast).max() > 1
