"""The structure of the repository: folders do not import each other in a circle, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("actvar", "actvar_kernels")
MOST_LINES = 400


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by module name."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return dict(zip(names, paths, strict=True))


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def box(module: str) -> str:
    """Return the folder or file at the root of the package that a module is in; "" for the package itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_folders_import_each_other_in_a_circle(package):
    known = modules(package)
    edges: dict[str, set[str]] = {box(name): set() for name in known}
    for name, path in known.items():
        edges[box(name)] |= {box(other) for other in imported(path, known) if other in known} - {box(name), ""}
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys()}
        assert leaves, f"these import each other: { {name: others & edges.keys() for name, others in edges.items()} }"
        edges = {name: others for name, others in edges.items() if name not in leaves}


def test_folders_import_only_from_lines_below_theirs_in_the_page_on_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    picture = page.partition("```text\n")[2].partition("\n\n")[0]
    line_of = {name: i for i, line in enumerate(picture.splitlines()) for name in line[:20].split()}
    known = modules("actvar")
    assert line_of.keys() == {box(name) for name in known} - {"", "__main__"}
    for name, path in known.items():
        for other in {box(module) for module in imported(path, known) if module in known} - {box(name), ""}:
            assert name.endswith("__main__") or line_of.get(box(name), -1) < line_of[other], (name, other)


@pytest.mark.parametrize(("package", "most"), [("actvar", 21), ("actvar_kernels", 21)])
def test_the_root_of_a_package_can_be_taken_in_at_a_glance(package, most):
    boxes = {box(name) for name in modules(package)} - {""}
    assert len(boxes) <= most, sorted(boxes)


def test_files_stay_short():
    folders = (*PACKAGES, "tests")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
