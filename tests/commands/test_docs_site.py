"""The documentation as a site: it builds strictly, names every option and public name, and its claims name tests."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support.helpers import ROOT

import actvar
import actvar_kernels
from actvar.cli import COMMANDS, main
from scripts.docs_site import MODULES, api_pages, cli_page, stage

OUTSIDE = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["'](?:https?:)?//[^"']+""")


def test_the_page_of_commands_has_every_option_of_every_help(capsys):
    page = cli_page()
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}
        part = page.partition(f"\n## actvar {command}\n")[2].partition("\n## ")[0]
        assert options - set(re.findall(r"--[a-z][\w-]*", part)) <= {"--nproc-per-node"}, command
        assert "`--quiet`" in part
    assert "`--num NUM`" in page
    assert "`--format {png}`" in page
    assert "`FILE`" in page


def test_the_pages_of_names_have_every_public_name():
    pages = api_pages()
    for name, package in (("actvar.md", actvar), ("actvar_kernels.md", actvar_kernels)):
        assert re.findall(r"^      heading: (\w+)$", pages[name], re.MULTILINE) == list(package.__all__)
    for page in pages.values():
        for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
            module, _, name = path.rpartition(".")
            assert getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name).__doc__, path
    assert sum(map(len, MODULES.values())) == pages["more.md"].count("\n::: ")


def test_the_pages_keep_what_they_link_to(tmp_path):
    stage(tmp_path)
    for file in ("README.md", "CITATION.cff", "docs/cli.md", "docs/api/actvar.md", "examples/many_images.py"):
        assert (tmp_path / file).stat().st_size > 0
    assert not (tmp_path / "setup.py").exists()


def test_every_page_is_in_the_list_of_the_site(tmp_path):
    stage(tmp_path)
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.md")}
    assert pages == set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))


def test_no_page_has_a_diagram_that_a_script_of_another_host_would_draw(tmp_path):
    stage(tmp_path)
    assert [str(page) for page in tmp_path.rglob("*.md") if "```mermaid" in page.read_text("utf-8")] == []


def missing_tests(page: str) -> list[str]:
    """Return the tests that a page lists and that do not exist."""
    found = []
    for file, name in re.findall(r"^\d+\. `(tests/[\w/]+\.py)::(\w+)`$", page, re.MULTILINE):
        path = ROOT / file
        if not path.exists() or f"\ndef {name}(" not in path.read_text("utf-8"):
            found.append(f"{file}::{name}")
    return found


def test_every_cell_of_the_support_matrix_names_a_test_that_exists():
    page = (ROOT / "docs" / "support.md").read_text("utf-8")
    tests, listed = page.partition("\n## The tests\n")[::2]
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", listed, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert missing_tests(page) == []
    named = set()
    rows = [line for line in tests.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 15
    cells = [cell.strip() for row in rows for cell in row.strip("| ").split(" | ")[1:]]
    for cell in cells:
        references = [int(number) for number in re.findall(r"\[(\d+)\]\(#the-tests\)", cell)]
        assert references or cell == "not tested" or cell in HEADINGS, cell
        named.update(references)
    assert named == set(numbers)


HEADINGS = {
    *("`accelerate`", "tokens and experts", "`guidance_until`", "`calibrate`", "`distill`", "`torch.compile`"),
    *("float32", "bfloat16", "float16", "autocast", "CPU", "CUDA", "public class"),
}


def test_a_test_that_does_not_exist_would_be_found():
    page = "1. `tests/model/test_patch.py::test_removal_is_bit_exact`\n2. `tests/model/test_patch.py::test_nothing`\n"
    assert missing_tests(page) == ["tests/model/test_patch.py::test_nothing"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_another_host(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-m", "scripts.docs_site"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {str(page.relative_to(ROOT / "site")): page.read_text("utf-8") for page in (ROOT / "site").rglob("*.html")}
    assert {"index.html", "docs/cli.html", "docs/api/actvar.html", "docs/support.html"} <= pages.keys()
    assert {name: found for name, page in pages.items() if (found := OUTSIDE.findall(page))} == {}
    for words in ("Let kernels run the dense model", "Raises", "num_experts"):
        assert words in pages["docs/api/actvar.html"]
