"""The page of `actvar inspect`: its data against the recorder, and its script in a real browser where there is one."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actvar import ActVARConfig, record
from actvar.cli import main
from actvar.flops import total_flops
from actvar.patching.patch import patched_silently
from actvar.reports.inspection import inspect_sample, save_page
from actvar.reports.inspection.page import explorer_data, page
from actvar.sampling.request import Sampling
from actvar.utils.pictures import pixel_values

CONFIG = ActVARConfig(num_experts=8, token_rates=((0.5, 1.0), 0.75), ffn_rate=((1.0, 1.0), 0.5))
SAMPLING = Sampling((3,), seed=5, top_k=20)
FACTS = ("tiny <model>", "fp32")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture
def inspection(tiny_var):
    return inspect_sample(tiny_var, CONFIG, None, SAMPLING, repeats=1)


class _Elements(HTMLParser):
    """Tags with their attributes, and the text of the element `data`."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][1].get("id") == "data":
            self.data += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_tokens_experts_and_loads_are_those_of_the_recorder(tiny_var, inspection):
    data = json.loads(_Elements(page(inspection, "t", FACTS)).data)
    assert data == explorer_data(inspection)
    with patched_silently(tiny_var, CONFIG, None), record(tiny_var) as records:
        SAMPLING.run(tiny_var)
    assert [(scale["step"], scale["height"], scale["width"]) for scale in data["scales"]] == [(3, 3, 3), (4, 5, 5)]
    of_page = {(s["step"] - 1, block): b for s in data["scales"] for block, b in enumerate(s["blocks"])}
    assert (len(of_page), len(records)) == (4, 3)
    for of_block in records:
        shown = of_page.pop((of_block.scale.index, of_block.block))
        index = of_block.index[0].tolist()
        assert shown["kept"] == sorted(index)
        if of_block.mask is None:
            assert (shown["experts"], shown["load"]) == (None, None)
            continue
        mask = dict(zip(index, of_block.mask[0].tolist(), strict=True))
        assert shown["experts"] == ["".join("1" if on else "0" for on in mask[token]) for token in sorted(index)]
        assert shown["load"] == pytest.approx(np.mean([mask[token] for token in index], axis=0), abs=1e-4)
    assert of_page == {(2, 1): {"kept": list(range(9)), "experts": None, "load": None}}, "a dense block updates all"


def test_images_after_each_scale_and_flops_are_on_the_page(tiny_var, inspection):
    text = page(inspection, "t", FACTS)
    sources = [attributes["src"] for attributes in _Elements(text).all("img")]
    assert len(sources) == 2 * len(tiny_var.patch_nums)
    final = {"dense": SAMPLING.run(tiny_var)}
    with patched_silently(tiny_var, CONFIG, None):
        final["actvar"] = SAMPLING.run(tiny_var)
    for place, source in enumerate(sources):
        head, _, encoded = source.partition(",")
        assert head == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))))
        name, scale = ("dense", "actvar")[place % 2], place // 2
        assert np.array_equal(pixels, pixel_values(inspection.images[name][scale, 0]).numpy())
        if scale == len(tiny_var.patch_nums) - 1:
            assert np.array_equal(pixels, pixel_values(final[name][0, 0]).numpy())
    for flops in inspection.flops.values():
        assert f"{total_flops(flops) / 1e9:.3f}" in text
        assert all(f"<b>{step.total / 1e9:.3f}</b>" in text for step in flops)


def test_the_page_needs_nothing_else_and_names_are_escaped(inspection):
    text = page(inspection, "<script>alert(1)</script>", FACTS)
    parsed = _Elements(text)
    addresses = [
        attributes[name] for _, attributes in parsed.found for name in ("src", "href", "srcset") if name in attributes
    ]
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not parsed.all("link")
    assert len(parsed.all("script")) == 2
    assert "tiny &lt;model&gt;" in text


def test_the_same_seed_gives_the_same_page_apart_from_times(tiny_var, inspection, tmp_path):
    again = inspect_sample(tiny_var, CONFIG, None, SAMPLING, repeats=2)
    assert inspection.seconds.keys() == {"dense", "accelerated", "actvar"}
    assert all(len(steps) == 5 and min(steps) > 0 for steps in inspection.seconds.values())
    first = save_page(inspection, tmp_path / "first.html", "t", FACTS)
    second = save_page(replace(again, seconds=inspection.seconds), tmp_path / "second.html", "t", FACTS)
    assert first.read_bytes() == second.read_bytes()
    other = inspect_sample(tiny_var, CONFIG, None, replace(SAMPLING, seed=6), repeats=1)
    assert explorer_data(other) != explorer_data(inspection)


def test_one_image_is_expected(tiny_var):
    with pytest.raises(ValueError, match="one image"):
        inspect_sample(tiny_var, CONFIG, None, Sampling((1, 2)), repeats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "10"], "--label: the model has classes 0-9, got 10"),
        (["--label", "-1"], "--label: the model has classes 0-9, got -1"),
        (["--label", "1", "--out", f"{__file__}/page.html"], "--out: expected a folder at"),
        ([], "--label"),
    ],
)
def test_wrong_arguments_say_what_to_do(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--model", "fashion-mnist", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def bundled_page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "inspect.html"
    main(
        [
            "inspect",
            "--model",
            "fashion-mnist",
            "--adapter",
            "paper",
            "--label",
            "7",
            "--repeats",
            "1",
            "--out",
            str(path),
        ]
    )
    return path


def test_the_command_names_what_it_drew(bundled_page):
    text = bundled_page.read_text("utf-8")
    assert "<h1>sneaker</h1>" in text
    assert "adapter-paper.safetensors" in text
    assert json.loads(_Elements(text).data)["experts"] == 16


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
class TestInABrowser:
    WATCH = """<script>
    for (const kind of ["error", "securitypolicyviolation"])
      addEventListener(kind, (event) => document.documentElement.setAttribute("data-error", event.message ?? kind));
    </script>"""

    def opened(self, written: Path, fragment: str = "", then: str = "") -> str:
        """The document as the browser has it, with `then` run after the page's own script."""
        text = written.read_text("utf-8").replace("<style>", self.WATCH + "<style>", 1)
        copy = written.with_name("opened.html")
        copy.write_text(text.replace("</body>", f"<script>{then}</script></body>", 1), "utf-8")
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        profile = f"--user-data-dir={written.parent / 'profile'}"
        command = [
            BROWSER,
            "--headless",
            "--disable-gpu",
            *as_root,
            profile,
            "--virtual-time-budget=2000",
            "--dump-dom",
        ]
        run = subprocess.run([*command, copy.as_uri() + fragment], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert _Elements(run.stdout).all("html") == [{"lang": "en"}], "no data-error"
        return run.stdout

    def shown(self, dom: str) -> tuple[str, list[int]]:
        """The caption, and the tokens that are drawn as updated."""
        caption = re.search(r'<p id="caption"[^>]*>([^<]*)</p>', dom)[1]
        return caption, [int(token) for token in re.findall(r'class="kept" data-token="(\d+)"', dom)]

    def test_the_address_chooses_step_and_block(self, bundled_page):
        dom = self.opened(bundled_page, "#block=3&step=5")
        caption, tokens = self.shown(dom)
        block = json.loads(_Elements(dom).data)["scales"][0]["blocks"][2]
        assert caption == "Block 3 of 6: 27 of 36 tokens updated, 12 of 16 experts each."
        assert tokens == block["kept"]
        assert re.findall(r"<b>(\d+)</b><span>(\d+) %</span>", dom) == [
            (str(expert), str(int(100 * load + 0.5))) for expert, load in enumerate(block["load"], 1)
        ]

    def test_the_slider_changes_what_is_drawn(self, bundled_page):
        slide = 'const s = document.getElementById("block"); s.value = 5; s.dispatchEvent(new Event("input"));'
        before, after = self.opened(bundled_page), self.opened(bundled_page, then=slide)
        data = json.loads(_Elements(before).data)["scales"][-1]
        for dom, block in ((before, 1), (after, 5)):
            caption, tokens = self.shown(dom)
            assert caption.startswith(f"Block {block} of 6: 48 of 64 tokens updated")
            assert tokens == data["blocks"][block - 1]["kept"]

    def test_all_blocks_and_one_token(self, bundled_page):
        choose = (
            'document.querySelector("input[value=all]").click();'
            'const box = document.getElementById("stage").getBoundingClientRect();'
            'document.getElementById("stage").dispatchEvent(new MouseEvent("click",'
            "{clientX: box.left + 0.99 * box.width, clientY: box.top + 0.01}));"
        )
        dom = self.opened(bundled_page, "#block=2&step=6", choose)
        scale = json.loads(_Elements(dom).data)["scales"][-1]
        reached = len({token for block in scale["blocks"] for token in block["kept"]})
        assert self.shown(dom)[0].endswith(f"together they reach {reached} of 64.")
        told = re.search(r'<p id="token">([^<]*)</p>', dom)[1]
        block = scale["blocks"][1]
        if 7 in block["kept"]:
            on = block["experts"][block["kept"].index(7)]
            experts = ", ".join(str(expert) for expert, bit in enumerate(on, 1) if bit == "1")
            assert told == f"Row 1, column 8: experts {experts}."
        else:
            assert told == "Row 1, column 8: this block left it as it was."
