"""`actvar demo`: what is drawn without gradio, and the page in a browser where there are both."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support.helpers import ROOT, make_tiny_var

from actvar import ActVARConfig, apply_patch, load_pretrained, record, remove_patch, save_adapter
from actvar.cli import main, top_parser
from actvar.reports.demo.drawing import Drawing
from actvar.reports.demo.page import answers
from actvar.reports.demo.subjects import ALL, Classes
from actvar.reports.token_overlay import times_updated, tinted_by_updates
from actvar.sampling.request import Sampling
from actvar.utils.pictures import as_grid

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture
def drawing(tmp_path) -> Drawing:
    """A tiny model with a stop that saves nothing, one that saves tokens, and one that ends guidance as well."""
    var = make_tiny_var()
    configs = {
        "less": ActVARConfig(num_experts=8, token_rates=(0.5, 0.5)),
        "least": ActVARConfig(num_experts=8, token_rates=(0.5, 0.5), guidance_until=-2),
    }
    files = {"lossless": None}
    for name, config in configs.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_adapter(apply_patch(var, config), files[name])
    remove_patch(var)
    return Drawing(var, Classes(NAMES), dict(reversed(files.items())))


def test_the_stops_are_in_the_order_of_what_they_save_and_say_it(drawing):
    assert drawing.stops == ("lossless", "less", "least")
    assert "all tokens, experts and rows at every scale" in drawing.describe("lossless")
    assert "no guidance" in drawing.describe("least")
    assert not hasattr(drawing.model, "actvar")


@pytest.mark.parametrize(("name", "labels"), [(ALL, tuple(range(10))), ("class 3", (3,))])
def test_three_ways_draw_the_same_request(drawing, name, labels):
    dense, accelerated, sparse = drawing.draw(drawing.subject.request(name, 5.0, 2), "less")
    images, columns = Sampling(labels, 2.0, seed=5).run(drawing.model), min(5, len(labels))
    assert np.array_equal(np.asarray(dense.picture), np.asarray(as_grid(images, columns, 64 * 5 // columns)))
    assert [each.title for each in (dense, accelerated, sparse)] == ["dense", "accelerated", "less"]
    assert all(each.seconds > 0 for each in (dense, accelerated, sparse))
    difference = np.asarray(accelerated.picture).astype(int) - np.asarray(dense.picture)
    assert abs(difference).max() <= 1
    assert not np.array_equal(np.asarray(sparse.picture), np.asarray(dense.picture))
    assert (dense.tinted, accelerated.tinted) == (None, None)
    assert sparse.tinted.size == sparse.picture.size
    assert any("of the tokens" in line for line in sparse.lines)
    assert sparse.lines[1].startswith("PSNR ")
    assert not hasattr(drawing.model, "actvar")


def test_what_cannot_be_drawn_is_refused(drawing):
    with pytest.raises(ValueError, match=r"stop: expected one of \['lossless', 'less', 'least'\], got 'more'"):
        drawing.draw(drawing.subject.first, "more")
    with pytest.raises(ValueError, match=r"class: expected one of .*'class 9'\], got 'class 10'"):
        drawing.subject.request("class 10", 0, 1.5)


@pytest.mark.parametrize("until", [None, -1], ids=["with guidance", "without in the last scale"])
def test_the_tint_is_the_share_of_the_blocks_that_updated_a_token(until):
    var = make_tiny_var(image_channels=3)
    apply_patch(var, ActVARConfig(num_experts=8, token_rates=((0.5, 1.0), (0.5, 1.0)), guidance_until=until))
    with record(var) as records:
        images = var.autoregressive_infer_cfg(2, torch.tensor([1, 2]), g_seed=0)
    tinted = tinted_by_updates(images, records)
    last = [r.only([0, 1]) for r in records if r.scale.tokens == 25]
    share = times_updated(last).view(2, 5, 5) / 2
    assert set(share.unique().tolist()) == {0.5, 1.0}
    side = images.shape[2] // 5
    for row, column in ((0, 0), (2, 3), (4, 4)):
        strength = 0.6 * share[:, row, column].view(2, 1)
        pixel = images[:, :, row * side, column * side]
        expected = (1 - strength) * pixel + strength * torch.tensor([1.0, 0.55, 0.1])
        torch.testing.assert_close(tinted[:, :, row * side, column * side], expected)
    assert tinted_by_updates(images, []) is None


def test_the_answers_of_the_page_are_pictures_and_texts(drawing):
    found = answers(drawing, "class 3", 5.0, 2.0, 1.0)
    ways = drawing.draw(drawing.subject.request("class 3", 5, 2.0), "less")
    for picture, text, way in zip(found[0::2], found[1::2], ways, strict=False):
        assert np.array_equal(np.asarray(picture), np.asarray(way.picture))
        assert text.startswith(f"**{way.title}**: ")
        assert " ms" in text
    assert np.array_equal(np.asarray(found[6]), np.asarray(ways[2].tinted))
    assert answers(drawing, ALL, 5, 2.0, 0)[6:] == [None, "**updated tokens**: All blocks update all tokens."]


@pytest.fixture
def served(monkeypatch) -> list[tuple]:
    """Return what would be served."""
    found = []
    monkeypatch.setattr("actvar.cli.demo.serve", lambda *arguments: found.append(arguments))
    return found


def test_the_command_serves_the_bundled_model_to_this_machine_alone_by_default(served, capsys):
    main(["demo"])
    ((drawing, title, host, port),) = served
    assert (title, host, port) == ("ActVAR: fashion-mnist", "127.0.0.1", 7860)
    assert drawing.stops[0] == "lossless"
    assert set(drawing.stops) == {"lossless", "near", "fast", "fastest", "best", "paper", "paper-stage1"}
    assert drawing.subject.names[5] == "sandal"
    assert "the page is at http://127.0.0.1:7860" in capsys.readouterr().out


def test_the_command_serves_a_checkpoint_with_its_adapter(served, tmp_path):
    var = make_tiny_var()
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(var.vae_proxy[0].state_dict(), tmp_path / "vae.pth")
    save_adapter(apply_patch(var, ActVARConfig(num_experts=8)), tmp_path / "mine.safetensors")
    files = ["--var", str(tmp_path / "var.pth"), "--vae", str(tmp_path / "vae.pth")]
    main(["demo", *files, "--adapter", str(tmp_path / "mine.safetensors"), "--port", "8000"])
    ((drawing, title, _, port),) = served
    assert (title, port, drawing.stops) == ("ActVAR: var.pth", 8000, ("lossless", "mine"))


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--model", "fashion-mnist-small"])
    assert stopped.value.code == 2
    assert "pip install 'actvar[demo]'" in capsys.readouterr().err
    assert top_parser()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def address(tmp_path, model):
    """Serve the page of a bundled model, and return its address."""
    port = free_port()
    command = [sys.executable, "-m", "actvar", "demo", "--model", model, "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("playwright") and CHROMIUM), reason="needs gradio, playwright and Chromium"
)
@pytest.mark.parametrize("width", [1400, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    ("model", "number", "stop", "pictures"),
    [("fashion-mnist", 3, "best", 4), ("fashion-mnist-text", 2, "fast", 3)],
    ids=["classes", "texts"],
)
def test_the_page_draws_in_a_browser_and_asks_no_other_host(address, number, stop, pictures, width, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        position = page.get_by_role("spinbutton", name="number input for preset")
        position.fill(str(number))
        position.press("Enter")
        expect(page.get_by_text(f"{stop}: ")).to_be_visible(timeout=60_000)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("updated tokens:")).to_be_visible(timeout=120_000)
        expect(page.get_by_text("as fast as dense").first).to_be_visible()
        assert page.locator("img").count() >= pictures
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert others == []


def test_the_bundled_adapter_that_selects_tokens_is_tinted():
    _, var = load_pretrained("fashion-mnist", adapter="paper")
    with record(var) as records:
        images = var.autoregressive_infer_cfg(1, 7, g_seed=0)
    assert tinted_by_updates(images, records).shape == (1, 3, 32, 32)
