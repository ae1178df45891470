"""Run the Python of README and docs on small models, and check that what the pages name is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.helpers import PAGES, ROOT
from support.infinity import tiny_infinity
from support.tiny_t5 import StandIn

import actvar.text.encoder
from actvar import ActVARConfig, apply_patch, read_adapter_config, save_adapter
from actvar.families.var_mixin import PatchedVAR
from actvar.models import build_vae_var

SNIPPETS = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
]
NAMED = [f"{page.stem}-{number}" for number, (page, _) in enumerate(SNIPPETS)]
SMALL = dict(V=1024, Cvae=8, ch=32, depth=2, patch_nums=(1, 2, 3, 5))
OWN = ActVARConfig(token_rates=((0.5, 1.0), 0.75), ffn_rate=(0.5, (1.0, 0.25)), num_experts=8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build_small(**sizes: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_vae_var(**(sizes | SMALL))


@pytest.fixture
def sampled_with(tmp_path, monkeypatch) -> list[ActVARConfig]:
    """Return the configurations that are sampled with.

    The files of the snippets lie in the current folder, with random weights; the public code's `models` builds small
    models.
    """
    monkeypatch.chdir(tmp_path)
    vae, var = build_small(seed=1)
    states = {"vae_local": vae.state_dict(), "var_wo_ddp": var.state_dict()}
    torch.save(states["vae_local"], "vae_ch160v4096z32.pth")
    torch.save(states["var_wo_ddp"], "var_d16.pth")
    torch.save({"epoch": 3, "trainer": states}, "ar-ckpt-last.pth")
    save_adapter(apply_patch(var, OWN), "adapter.safetensors")
    models = ModuleType("models")
    models.build_vae_var = build_small
    monkeypatch.setitem(sys.modules, "models", models)
    found, sampling = [], PatchedVAR.autoregressive_infer_cfg

    def noted(self, *args, **kwargs):
        found.append(self.actvar.config)
        return sampling(self, *args, **kwargs)

    monkeypatch.setattr(PatchedVAR, "autoregressive_infer_cfg", noted)
    return found


def expect_to_run(page: Path, code: str, sampled_with: list[ActVARConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    if "infinity_2b_reg.pth" in code:
        tokenizer, infinity = tiny_infinity()
        torch.save(infinity.state_dict(), "infinity_2b_reg.pth")
        torch.save({"vae": tokenizer.state_dict()}, "infinity_vae_d32reg.pth")
    if "TextEncoder" in code:
        monkeypatch.setattr(actvar.text.encoder, "load_t5", lambda name, dtype: StandIn().loaded)
    names: dict = {}
    exec(compile(code.replace('"cuda"', f'"{DEVICE}"'), str(page), "exec"), names)
    for result in ("images", "picture"):
        if result in names:
            assert len(names[result]) == {"images": 8, "picture": 1}[result]
            assert names[result].isfinite().all()
    if 'save_adapter(var, "adapter.safetensors")' in code:
        assert read_adapter_config("adapter.safetensors") == names["var"].actvar.config != OWN
    elif 'load_adapter(var, "adapter.safetensors")' in code:
        assert names["var"].actvar.config == OWN
    elif 'adapter="adapter.safetensors"' in code:
        assert sampled_with == [OWN]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=NAMED)
def test_a_snippet_runs_and_samples_with_the_adapters_own_rates(page, code, sampled_with, monkeypatch) -> None:
    expect_to_run(page, code, sampled_with, monkeypatch)


def test_the_snippets_are_found() -> None:
    assert sum(page.name == "README.md" for page, _ in SNIPPETS) == 2
    assert sum("load_adapter(" in code or "patched(" in code for _, code in SNIPPETS) >= 4
    assert sum(page.read_text("utf-8").count("```python") for page in PAGES) == len(SNIPPETS)


@pytest.mark.public_var
@pytest.mark.parametrize(("page", "code"), [each for each in SNIPPETS if "from models import" in each[1]])
def test_a_snippet_runs_with_the_public_code(page, code, build_public, sampled_with, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["models"], "build_vae_var", lambda **sizes: build_public(**(sizes | SMALL)))
    expect_to_run(page, code, sampled_with, monkeypatch)
    assert len(sampled_with) == 1


WITHOUT_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:actvar|actvar_kernels|benchmarks|docs|scripts|tests)/[\w./-]+)`")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Return the links of `text`, on `page`, that lead to no file or to no heading."""
    found = []
    for target in LINK.findall(WITHOUT_CODE.sub("", text)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_and_named_files_are_there(page) -> None:
    text = page.read_text("utf-8")
    assert dead_links(page, text) == []
    assert [name for name in FILE.findall(text) if "NAME" not in name and not (ROOT / name).exists()] == []


def test_dead_links_would_be_found() -> None:
    text = "[a](docs/nowhere.md) [b](docs/install.md#nowhere) [c](#nowhere) [d](docs/install.md#what-was-tried)"
    assert dead_links(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/install.md#nowhere", "#nowhere"]


def test_every_page_is_linked_from_readme_or_a_page_that_is() -> None:
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page not in seen:
            seen.add(page)
            targets = (page.parent / target.partition("#")[0] for target in LINK.findall(page.read_text("utf-8")))
            left += [target.resolve() for target in targets if target.suffix == ".md" and target.exists()]
    assert set(PAGES) <= seen


def test_the_messages_of_troubleshooting_are_the_programs_own() -> None:
    part = (ROOT / "README.md").read_text("utf-8").partition("## Troubleshooting")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", part, re.MULTILINE)
    assert len(messages) == 6
    code = "".join(
        file.read_text("utf-8") for folder in ("actvar", "actvar_kernels") for file in (ROOT / folder).rglob("*.py")
    )
    assert [message for message in messages if message not in code] == []
