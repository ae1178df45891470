"""Check that every figure in README.md and docs/ has a row behind it: `python -m benchmarks.docs_check`.

A figure stands between markers that name a file of `FILES` and what is shown of it:

    <!-- rows file=h100 where="operation=whole sample" by="model|batch" pivot=provider show="a|b|a / b" -->
    <!-- /rows -->
    in prose <!-- row file=h100 where="..." pivot=provider show="a / b" -->2.2x<!-- /row -->

`where` keeps rows, `by` names the columns that label a line, and `show` the columns of figures. With `pivot` the rows
of one label are one line: the values of that column become columns, of `value`, by default `p50`. `a / b` is how many
times `a` is as large as `b`, and `title: a` names a column. `<!-- output COMMAND -->` holds what a command prints.
`--write` puts the figures of the files into the pages.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.paper.measure import load_measured
from benchmarks.paper.page import page_text
from benchmarks.paper.recipes import read_rows

ROOT = Path(__file__).parent.parent
FILES = {
    "epyc-avx512": "benchmarks/results/amd-epyc-2-threads-avx-512-with-bfloat16.csv",
    "epyc-zen4": "benchmarks/results/amd-epyc-zen-4-2-threads-avx-512-with-bfloat16.csv",
    "xeon-amx": "benchmarks/results/intel-xeon-2-threads-avx-512-with-bfloat16-and-amx.csv",
    "epyc-avx2": "benchmarks/results/amd-epyc-2-threads-avx2.csv",
    "h100": "benchmarks/results/nvidia-h100-80gb-hbm3.csv",
    "predicted-h100": "docs/evaluation/predicted-h100.json",
    "predicted-infinity": "docs/evaluation/predicted-infinity-h100.json",
    "gpu-memory": "docs/evaluation/gpu-memory.json",
    "predicted-h100-before": "docs/evaluation/predicted-h100-before.json",
    "evaluation": "docs/evaluation/fashion-mnist-5000.json",
    "presets": "docs/evaluation/fashion-mnist-presets-avx2.json",
    "int8": "docs/evaluation/fashion-mnist-int8.json",
    "fp8": "docs/evaluation/fashion-mnist-fp8.json",
    "all": "docs/evaluation/fashion-mnist-all.json",
    "text": "docs/evaluation/fashion-mnist-text.json",
    "text-pairs": "docs/evaluation/fashion-mnist-text-pairs.json",
}
SPAN = re.compile(r"(<!-- (rows?|output) (.*?) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# A line of a table with a cell that is a figure alone, or a number with a unit of measurement.
FIGURE = re.compile(
    r"^(?:\|.*)?\| *(?:\d+\.\d+|\d{3,})(?:x| ±.*?)? *\|.*$|\b\d[\d.,]*(?:x\b| ?(?:ms|GFLOP|GB/s|MiB|FID|times)\b)",
    re.MULTILINE,
)


def pages() -> list[Path]:
    """Return the pages with markers; docs/paper.md is written as a whole by `make paper`."""
    return [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "paper.md")]


def load(name: str) -> list[dict[str, object]]:
    """Return the rows of a file: a CSV, a JSON list of objects, or a report of `actvar evaluate`."""
    path = ROOT / FILES[name]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    found = json.loads(path.read_text("utf-8"))
    return found if isinstance(found, list) else list(evaluated(found["methods"]))


def evaluated(methods: Mapping[str, dict]) -> Iterable[dict[str, object]]:
    """Yield a row per method of an evaluation; intervals stand behind the mean."""
    base = methods.get("accelerated")
    for name, of in methods.items():
        row: dict[str, object] = {"method": name, "ms": 1e3 * of["seconds"], "GFLOP": of["flops"] / 1e9}
        row |= {metric: mean(of[metric], interval) for metric, interval in of["interval"].items()}
        if "fid" in of["minus_dense"]:
            row["above dense"] = mean(**of["minus_dense"]["fid"])
        if "fid_lite0" in of["minus_dense"]:
            row["above dense, Lite0"] = mean(**of["minus_dense"]["fid_lite0"])
        if base is not None:  # in the same round, so that what else the machine does is in both
            pairs = zip(base["seconds_of_batches"], of["seconds_of_batches"], strict=True)
            row["speed"] = f"{statistics.median(a / b for a, b in pairs):.2f}x"
        yield row | {f"kl {side}": kl for side, kl in of.get("kl_drawn", {}).items() if kl is not None}


def mean(mean: float, interval: float | None) -> str:
    """Return a mean with half of its 95 % interval, where there is one."""
    return number(mean) if interval is None else f"{number(mean)} ± {interval:.2g}"


def number(value: object) -> str:
    """Return a number with three digits, or all that stand before the point; a text as it is."""
    try:
        value = float(value)
    except ValueError:
        return str(value)
    if abs(value) < 0.0005:
        return "0"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 3)}f}"


def lines(file: str, show: str, where: str = "", by: str = "", pivot: str = "", value: str = "p50") -> list[list[str]]:
    """Return the cells of every line, labels first, in the order of the file."""
    wanted = [item.split("=", 1) for item in where.split(";") if item]
    found: dict[tuple, dict] = {}
    for row in load(file):
        if all(str(row[column]) in choices.split("|") for column, choices in wanted):
            label = tuple(str(row[column]) for column in by.split("|") if column)
            found.setdefault(label, {}).update({row[pivot]: row[value]} if pivot else row)
    columns = [item.rpartition(": ")[2].partition(" / ") for item in show.split("|")]
    return [[*label, *(figure(cells, *column) for column in columns)] for label, cells in found.items()]


def figure(cells: Mapping[str, object], over: str, _: str, under: str) -> str:
    """Return a cell, or how many times it is as large as the cell `under`."""
    return f"{float(cells[over]) / float(cells[under]):.2f}x" if under else number(cells.get(over, ""))


def rendered(kind: str, arguments: str) -> str:
    """Return what stands between the markers, by the files as they are."""
    if kind == "output":
        words = shlex.split(arguments.replace("actvar", "python -m actvar", 1))
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True, cwd=ROOT)
        return f"\n```text\n{done.stdout.strip()}\n```\n"
    options = dict(word.split("=", 1) for word in shlex.split(arguments))
    found = lines(**options)
    if kind == "row":
        [[figure_in_prose]] = found
        return figure_in_prose
    shown = [item.partition(": ")[0].replace(" / ", " over ") for item in options["show"].split("|")]
    table = [[*options["by"].split("|"), *shown], ["---"] * len(found[0]), *found]
    return "\n" + "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def checked(text: str, commands: bool = False) -> tuple[str, list[str]]:
    """Return a page with the figures that its markers ask for, and the figures outside of markers."""

    def put(match: re.Match) -> str:
        start, kind, arguments, _, end = match.groups()
        return match[0] if kind == "output" and not commands else start + rendered(kind, arguments) + end

    return SPAN.sub(put, text), [match[0] for match in FIGURE.finditer(CODE.sub("", SPAN.sub("", text)))]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.docs_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the figures of the files into the pages")
    parser.add_argument("--commands", action="store_true", help="also run the commands whose output a page shows")
    options = parser.parse_args(arguments)
    paper, wrong = ROOT / "docs" / "paper", []
    texts = {page: checked(page.read_text("utf-8"), options.commands) for page in pages()}
    of_paper = page_text(load_measured(paper / "results.csv"), read_rows(paper / "recipes.csv"))
    for page, (right, unmarked) in (texts | {paper.with_suffix(".md"): (of_paper, [])}).items():
        wrong += [f"{page.name}: expected a marker (benchmarks/docs_check.py) around {found!r}" for found in unmarked]
        if options.write:
            page.write_text(right, "utf-8")
        wrong += difflib.unified_diff(
            page.read_text("utf-8").splitlines(), right.splitlines(), page.name, "by the rows", n=0, lineterm=""
        )
    print("\n".join(wrong) or "every figure has a row behind it")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
