"""`actvar demo` with a model of texts: what its controls ask for, what is drawn, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar
from actvar.cli import main, sample_infinity
from actvar.models import scale_schedule
from actvar.models.infinity import schedules
from actvar.reports.demo.drawing import Drawing
from actvar.reports.demo.page import answers
from actvar.text import encoder as encoder_module
from actvar.utils.pictures import as_grid
from actvar.zoo import load_pretrained, load_text_encoder
from actvar.zoo.fashion_mnist_text.architecture import DRAW, SQUARE, WIDE

MODEL = ["--model", "fashion-mnist-text"]


@pytest.fixture
def served(monkeypatch) -> list[tuple]:
    """Return what would be served."""
    found = []
    monkeypatch.setattr("actvar.cli.demo.serve", lambda *arguments: found.append(arguments))
    return found


@pytest.fixture
def drawing(served) -> Drawing:
    """Return what the page of the bundled model of texts draws with."""
    main(["demo", *MODEL])
    return served[0][0]


def dense(prompts: list[str], schedule: schedules.Schedule, **numbers: float) -> np.ndarray:
    """Return the grid of images of the model itself, with seed 3 each."""
    _, infinity = load_pretrained("fashion-mnist-text")
    seeds = [3] * len(prompts)
    images = infinity.sample(*load_text_encoder()(prompts), schedule, g_seed=seeds, **DRAW | numbers)
    return np.asarray(as_grid(images, len(prompts), 64 * 5 // len(prompts)))


def test_the_page_of_the_bundled_model_begins_with_its_own_numbers_and_presets(served, drawing):
    _, title, host, port = served[0]
    assert (title, host, port) == ("ActVAR: fashion-mnist-text", "127.0.0.1", 7860)
    assert drawing.stops == ("lossless", "near", "fast")
    first = drawing.subject.first
    assert (first.cfg, first.tau, first.schedule) == (DRAW["cfg"], DRAW["tau"], SQUARE)
    assert len(first.prompts) == len(first.features) > 1
    assert drawing.subject.aspects == ()
    assert "6x6: no guidance" in drawing.describe("near")
    assert not hasattr(drawing.model, "actvar")


@pytest.mark.parametrize(
    ("text", "schedule"),
    [("a bag\n\n a dress \n", SQUARE), ("a bag and a dress", WIDE)],
    ids=["two prompts", "two garments"],
)
def test_the_prompts_tell_what_is_drawn_and_how_large(drawing, text, schedule):
    found = answers(drawing, text, None, 0.9, 3, 2, 2.0)
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    assert np.array_equal(np.asarray(found[0]), dense(prompts, schedule, tau=0.9, cfg=2.0))
    texts = found[1:6:2]
    assert [text.split("**")[1] for text in texts] == ["dense", "accelerated", "fast"]
    assert all(" ms" in text for text in texts)
    assert "as fast as dense" in texts[1]
    assert "no guidance" in texts[2]
    assert np.abs(np.asarray(found[2]).astype(int) - np.asarray(found[0])).mean() < 3
    assert not np.array_equal(np.asarray(found[4]), np.asarray(found[0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "prompts: expected one in each line, got none"),
        ("a horse", "got 'horse' in 'a horse'"),
        ("a bag\na bag and a dress", "draw them one after the other"),
    ],
)
def test_what_cannot_be_drawn_is_refused(drawing, text, message):
    with pytest.raises(ValueError, match=message):
        drawing.subject.request(text, None, 1.0, 0, 1.5)


@pytest.fixture
def files(monkeypatch, tmp_path) -> Path:
    """Return a folder with a tiny Infinity, its tokenizer and an adapter; images of 0.06M pixels have five scales."""
    made = StandIn()
    monkeypatch.setattr(encoder_module, "load_t5", lambda name, dtype: made.loaded)
    monkeypatch.setattr(sample_infinity, "default_folder", lambda: tmp_path / "cache")
    monkeypatch.setitem(schedules.SIZES, "0.06M", 5)
    tokenizer, infinity = tiny_infinity()
    torch.save(infinity.state_dict(), tmp_path / "model.pth")
    torch.save(tokenizer.state_dict(), tmp_path / "tokenizer.pth")
    actvar.save_adapter(actvar.apply_patch(infinity, actvar.ActVARConfig(num_experts=8)), tmp_path / "mine.safetensors")
    return tmp_path


def test_the_page_of_a_checkpoint_has_all_aspects_and_a_prompt_of_ones_own(served, files):
    model = ["--infinity", str(files / "model.pth"), "--tokenizer", str(files / "tokenizer.pth"), "--pn", "0.06M"]
    asked = ["--prompt", "a cat", "--aspect", "3:1", "--tau", "0.7", "--adapter", str(files / "mine.safetensors")]
    main(["demo", *model, *asked])
    ((drawing, title, _, _),) = served
    assert (title, drawing.stops) == ("ActVAR: model.pth", ("lossless", "mine"))
    subject = drawing.subject
    assert (subject.aspects[0], len(subject.aspects)) == ("3:1", len(schedules.ASPECTS))
    assert (subject.first.prompts, subject.first.tau, subject.first.cfg) == (("a cat",), 0.7, 4.0)
    found = {tuple(subject.request("dogs", aspect, 1, 0, 4).schedule) for aspect in subject.aspects}
    assert found == {tuple(scale_schedule(ratio, "0.06M")) for ratio in schedules.ASPECTS}
    with pytest.raises(ValueError, match=r"aspect: expected one of .*got '9:1'"):
        subject.request("dogs", "9:1", 1, 0, 4)
    drawn = answers(drawing, "dogs", "1:3", 0.5, 0, 4, 1)
    _, rows, columns = scale_schedule(3.0, "0.06M")[-1]
    assert drawn[0].size[1] / drawn[0].size[0] == pytest.approx(rows / columns, rel=0.1)
    assert drawn[6].size == drawn[4].size, "the adapter's tokens are tinted"


def test_options_of_texts_are_not_for_a_model_of_classes(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--prompt", "a bag"])
    assert stopped.value.code == 2
    assert "--prompt: expected --infinity" in capsys.readouterr().err
