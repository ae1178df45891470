"""The bundled model of texts by the commands: sample, inspect, verify, flops and models, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import actvar
from actvar.cli import main
from actvar.utils.pictures import pixel_values
from actvar.zoo import load_pretrained, load_text_encoder
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE, WIDE

MODEL = ["--model", "fashion-mnist-text"]


def drawn(prompts: list[str], schedule, seed: int, **numbers: float) -> np.ndarray:
    """Return the images of the model itself, each with the same seed."""
    _, infinity = load_pretrained("fashion-mnist-text")
    images = infinity.sample(*load_text_encoder()(prompts), schedule, g_seed=[seed] * len(prompts), **DRAW | numbers)
    return pixel_values(images).permute(0, 2, 3, 1).numpy()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_are_drawn_as_one_grid(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a bag\na dress\n", "utf-8")
    prompts = ["--prompt", "a sandal", "--prompts", str(tmp_path / "prompts.txt")]
    main(["sample", *MODEL, *prompts, "--seed", "3", "--dense", "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dense.png"]
    assert "images of 32x32 pixels, the template nearest to 1:1; 121 tokens in 5 scales" in capsys.readouterr().out
    first = pixels(tmp_path / "out" / "dense.png")[2:66:2, 2:66:2]
    assert np.array_equal(first, drawn(["a sandal"], SQUARE, 3)[0])


@pytest.mark.parametrize("aspect", [[], ["--aspect", "2:1"]], ids=["as the prompt says", "as asked"])
def test_a_wide_image_of_two_garments_with_numbers_of_ones_own(aspect, tmp_path, capsys):
    numbers = ["--cfg", "1.5", "--tau", "0.9", "--format", "png"]
    main(["sample", *MODEL, "--prompt", "a bag and a boot", *numbers, *aspect, "--dense", "--out", str(tmp_path)])
    assert "images of 64x32 pixels, the template nearest to 2:1; 241 tokens in 5 scales" in capsys.readouterr().out
    expected = drawn(["a bag and a boot"], WIDE, 0, cfg=1.5, tau=0.9)[0]
    assert np.array_equal(pixels(tmp_path / "dense-00000.png"), expected)


def test_compare_takes_an_adapter(tmp_path, capsys):
    _, infinity = load_pretrained("fashion-mnist-text")
    adapter = tmp_path / "adapter.safetensors"
    actvar.save_adapter(actvar.apply_patch(infinity), adapter)
    main(
        ["sample", *MODEL, "--prompt", "a bag", "--compare", "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    )
    assert "whole sample" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dense.png", "actvar.png", "difference.png", "tokens.png"}


def test_many_images_of_all_prompts(tmp_path):
    prompts = ["--prompt", "a bag", "--prompt", "a dress"]
    main(["sample", *MODEL, *prompts, "--num", "6", "--batch", "2", "--out", str(tmp_path)])
    settings = json.loads((tmp_path / "manifest.json").read_text())
    assert settings["prompts"] == ["a bag", "a dress"]
    assert {name: settings[name] for name in DRAW} == DRAW
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3


def test_inspect_verify_flops_and_models_know_it(tmp_path, capsys):
    main(["inspect", *MODEL, "--prompt", "a coat", "--repeats", "1", "--out", str(tmp_path / "page.html")])
    assert "a coat" in (tmp_path / "page.html").read_text("utf-8")
    main(["verify", *MODEL, "--backend", "reference"])
    printed = capsys.readouterr().out
    assert "images of 32x32 pixels" in printed
    main(["flops", *MODEL, "--aspect", "2:1", "--json", str(tmp_path / "flops.json")])
    printed = capsys.readouterr().out
    assert "texts of 4 tokens" in printed
    assert "memory, MiB" in printed
    assert json.loads((tmp_path / "flops.json").read_text())["maps"] == [[h, w] for _, h, w in WIDE]
    main(["models", "--json"])
    described = json.loads(capsys.readouterr().out)["fashion-mnist-text"]
    assert described["size"] == "5 blocks, width 160, 10 bits a token"
    assert {"a", "bag", "sandal", "beside"} <= set(described["words"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", *MODEL], "--model: say what to draw by --prompt TEXT"),
        (["sample", *MODEL, "--prompt", "a horse"], "expected words among a, an, and, .*got 'horse' in 'a horse'"),
        (["sample", *MODEL, "--prompt", "bag", "--labels", "3"], "--labels is not for --model fashion-mnist-text"),
        (["sample", *MODEL, "--prompt", "bag", "--pn", "1M"], "--pn is not for --model fashion-mnist-text"),
        (["sample", *MODEL, "--prompt", "bag", "--text-encoder", "t5"], "--text-encoder is not for --model"),
        (["sample", *MODEL, "--prompt", "bag", "--infinity", "x.pth"], "--infinity is not for --model"),
        (["sample", *MODEL, "--prompt", "bag", "--preset", "worst"], r"preset: fashion-mnist-text comes with"),
        (["sample", "--model", "fashion-mnist", "--prompt", "bag"], "--prompt: expected --infinity.* or --model"),
        (["verify", *MODEL, "--weights", "int8"], "--weights is not for"),
        (["flops", *MODEL, "--pn", "1M"], "--pn: fashion-mnist-text has one size"),
        (["push", "mine.safetensors", "me/mine", *MODEL], "--model: expected a model of classes"),
        (["sample", *MODEL, "--prompt", "a bag a boot"], "prompt: expected a garment, or two that one of and"),
        (
            ["sample", *MODEL, "--prompt", "a bag and a boot", "--aspect", "1:1"],
            "--aspect: expected 2:1, since .* images of two garments, got 1:1 with the prompt 'a bag and a boot'",
        ),
        (
            ["inspect", *MODEL, "--prompt", "a bag", "--aspect", "2:1"],
            "--aspect: expected 1:1, since .* images of one garment, got 2:1 with the prompt 'a bag'; leave it out",
        ),
        (
            ["sample", *MODEL, "--prompt", "a bag", "--prompt", "a bag and a boot"],
            "--prompts: expected one garment in each or two in each, .*draw them one after the other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err

    assert re.search(message, error), error
