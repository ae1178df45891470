"""Check the check of the figures in README and docs: it holds now, and a changed figure makes it fail."""

from __future__ import annotations

import re
import shutil

import pytest
from support.helpers import ROOT

from benchmarks import docs_check

PERFORMANCE = ROOT / "docs" / "performance.md"


def test_every_figure_of_readme_and_docs_has_a_row_behind_it(capsys):
    assert docs_check.main([]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_whose_output_is_shown_still_print_it(capsys):
    assert docs_check.main(["--commands"]) == 0, capsys.readouterr().out


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the pages and the rows, which the check reads instead."""
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "figure", "instead"),
    [
        ("README.md", "| accelerated | 7.13 |", "| accelerated | 7.03 |"),
        ("README.md", "-->2.24x<!--", "-->2.25x<!--"),
        ("docs/performance.md", "| 2551 |", "| 2550 |"),
        ("docs/paper.md", "| 12.8 |", "| 12.7 |"),
    ],
)
def test_a_changed_figure_fails_and_is_put_right(copy, page, figure, instead, capsys):
    text = (copy / page).read_text("utf-8")
    figure = figure if figure in text else re.search(r"\d\.\d\d\d", text)[0]
    (copy / page).write_text(text.replace(figure, instead, 1), "utf-8")
    assert docs_check.main([]) == 1
    assert page.split("/")[-1] in capsys.readouterr().out
    assert docs_check.main(["--write"]) == 0
    assert (copy / page).read_text("utf-8") == text


@pytest.mark.parametrize(
    "figure", ["Now 2.5x as fast.", "It takes 12 ms.", "An FID of 3.2 FID.", "| a | 1.25 |", "| 4711 | a |"]
)
def test_a_figure_outside_of_markers_fails(copy, figure, capsys):
    with (copy / "docs" / "install.md").open("a") as page:
        page.write(f"\n{figure}\n")
    assert docs_check.main([]) == 1
    assert "install.md: expected a marker" in capsys.readouterr().out


def test_rows_are_labelled_and_compared():
    where = 'where="operation=whole sample;batch=64"'
    table = docs_check.rendered(
        "rows", f'file=h100 {where} by=batch pivot=provider show="a: dense, graph|ActVAR, graph"'
    )
    head, _, line = table.strip().splitlines()
    assert head == "| batch | a | ActVAR, graph |"
    assert line.startswith("| 64 | 195 | 180 |")
    ratio = docs_check.rendered("row", f'file=h100 {where} pivot=provider show="dense, graph / ActVAR, graph"')
    assert ratio == "1.08x"
    with pytest.raises(ValueError, match="unpack"):
        docs_check.rendered(
            "row", 'file=h100 where="operation=whole sample" by=batch pivot=provider show="dense, graph"'
        )


@pytest.mark.parametrize(
    ("value", "text"),
    [(2550.8, "2551"), ("34.42", "34.4"), (0.9, "0.900"), (0.0, "0"), (-1e-9, "0"), ("1.16x", "1.16x")],
)
def test_numbers_have_three_digits(value, text):
    assert docs_check.number(value) == text
