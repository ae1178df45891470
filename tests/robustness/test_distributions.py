"""The distributions hold what git tracks, and nothing that lies beside it."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("actvar/", "actvar_kernels/")
with mock.patch("setuptools.setup"):
    description = runpy.run_path(str(ROOT / "setup.py"))["description"]
LEFT_OUT = (".ci/", ".git", ".github/", ".pre-commit-config.yaml")
"""List what the source distribution leaves out: settings of git and of the server that runs the tests."""
READ_BY_SETUP = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "actvar/__init__.py")
STRAY = (
    *("actvar-0.1.0-py3-none-any.whl", "demo/dense.png", "samples/0.png", "site/index.html", "build/docs/README.md"),
    *(
        "tests/__pycache__/a.cpython-311.pyc",
        "actvar/__pycache__/a.cpython-311.pyc",
        ".venv/bin/python",
        "paper-work",
    ),
    *("tests/.hypothesis/examples/a", "benchmarks/.ipynb_checkpoints/a.ipynb", "docs/.DS_Store", "examples/a.py~"),
)


def tracked() -> set[str]:
    """Return the files that git tracks."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture
def build(tmp_path):
    """Return a function that builds a distribution of a clone whose files are empty where the build does not read
    them, with stray files beside them."""
    clone = tmp_path / "clone"
    for name in {*tracked(), *STRAY}:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    for name in READ_BY_SETUP:
        shutil.copy(ROOT / name, clone / name)

    def build(kind: str) -> Path:
        code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
        command = [sys.executable, "-c", code, tmp_path]
        done = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True)
        return tmp_path / done.stdout.split()[-1]

    return build


def test_the_source_distribution_holds_what_git_tracks(build):
    with tarfile.open(build("sdist")) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or name.startswith("actvar.egg-info/")}
    assert files - made == {name for name in tracked() if not name.startswith(LEFT_OUT)}


def test_the_wheel_holds_the_two_packages(build):
    with zipfile.ZipFile(build("wheel")) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "actvar = actvar.cli:main" in archive.read(entry_points).decode()
    assert files == {name for name in tracked() if name.startswith(PACKAGES)}


@pytest.mark.parametrize("url", ["", "https://github.com/owner/ActVAR"])
def test_the_page_of_an_index_links_to_nothing_beside_it(url):
    readme = (ROOT / "README.md").read_text("utf-8")
    page = description(readme, url)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page)
    outside = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readme) if link.startswith("https:")]
    assert "<!--" not in page
    if not url:
        assert links == outside
        return
    assert "![clothes drawn by the dense model](https://github.com/owner/ActVAR/raw/v" in page
    paths = [match[1] for link in links if (match := re.fullmatch(rf"{url}/(?:raw|blob)/v[\d.]+/(.+)", link))]
    assert len(paths) + len(outside) == len(links) > 20
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_a_picture_within_a_text_and_a_link_to_a_heading():
    text = "See ![one](a/b.png), [two](docs/c.md#d), [three](#here) and [four](http://e.org/f).\n"
    assert description(text, "") == "See one, two, [three](#here) and [four](http://e.org/f).\n"
