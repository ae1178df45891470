"""Read and write the long-form CSV of a device, which every benchmark writes to and every plot is drawn from.

    python -m benchmarks.results gpu.json
    python -m benchmarks.results evaluation.json

turns the file that `make gpu` wrote, or `actvar evaluate --json` on this machine, into rows of
`benchmarks/results/<device>.csv`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from actvar.utils.files import replacing
from actvar_kernels.cpu_backend.choices import instructions, processor
from actvar_kernels.operations.shapes import SIZES

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """Hold one measured quantity.

    `provider`: who computed it. `operation`: an operation of a block, a part of a sample, or "evaluated sample".
    Shape: `model`, `batch` images (two rows each), `dtype`, `rate` of tokens and FFN at the last two scales, `experts`
    the FFN is cut into, `side` of the last token map; `step` of the sample, from 1 on, or 0 for all. `metric`: a unit;
    `p20`, `p50`, `p80` its percentiles.
    """

    provider: str
    operation: str
    model: str
    batch: int
    dtype: str
    rate: float
    experts: int
    side: int
    step: int
    metric: str
    p20: float
    p50: float
    p80: float
    torch: str
    triton: str
    commit: str
    time: str

    @property
    def key(self) -> tuple:
        """Say what was measured; a new row with the same key takes the place of the old one."""
        return astuple(self)[:10]


COLUMNS = tuple(field.name for field in fields(Result))
_TYPES = {
    "batch": int,
    "experts": int,
    "side": int,
    "step": int,
    "rate": float,
    "p20": float,
    "p50": float,
    "p80": float,
}


@dataclass(frozen=True)
class Shape:
    """Hold the shape columns of a row; `Result` says what they are."""

    model: str
    batch: int
    dtype: str
    rate: float
    side: int
    experts: int = 16

    def row(
        self, provider: str, operation: str, metric: str, values: Sequence[float], step: int = 0, **origin: str
    ) -> Result:
        """Return a row of the percentiles of `values`, measured by this checkout now, or as `origin` says."""
        percentiles = dict(zip(("p20", "p50", "p80"), map(_rounded, percentiles_of(values)), strict=True))
        measured = dict(provider=provider, operation=operation, metric=metric, step=step)
        return Result(**asdict(self), **measured, **percentiles, **(versions() | origin))


def percentiles_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile, interpolated linearly; of one value three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def versions() -> dict[str, str]:
    """Return the columns that say what measured a row: torch, triton, commit, time.

    The commit has a "+" where files differ from it.
    """
    return _checkout() | {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


@functools.cache
def _checkout() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "actvar", "actvar_kernels", "benchmarks/*.py")
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {"torch": torch.__version__, "triton": triton, "commit": commit + ("+" if changed else "")}


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def device_name() -> str:
    """Return the GPU; or the processor, the threads that torch uses, and the instructions that our kernels use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()} {torch.get_num_threads()} threads {instructions()}"


def csv_of(device: str) -> Path:
    """Return the file of a device's rows."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"


def read(path: Path) -> list[Result]:
    """Return the rows of a file.

    Raises:
        ValueError: other columns than ours.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        return [Result(**{name: _TYPES.get(name, str)(value) for name, value in row.items()}) for row in reader]


def add(path: Path, rows: Iterable[Result]) -> None:
    """Write `rows` into a file, in place of those with the same key; the others stay."""
    merged = {row.key: row for row in (*(read(path) if path.exists() else ()), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(astuple(row) for row in merged.values())


def gpu_rows(report: dict) -> list[Result]:
    """Return rows of the times in a report of `benchmarks.gpu`, and of launches and times of every kernel by name.

    A report of an earlier commit may have no early launches, no blocks of few rows and no tiles of attention.

    Raises:
        ValueError: operations whose numerics disagreed.
    """
    checked = (row for name in ("numerics", "graphs", "launches", "few_rows") for row in report.get(name, []))
    failed = {row.get("operation", "a block") for row in checked if not row.get("passed", True)}
    if failed:
        raise ValueError(f"expected numerics that agree, got failures of {', '.join(sorted(failed))}; not reported")
    machine, rows = report["machine"], []

    def add_row(shape: Shape, provider: str, operation: str, percentiles: Sequence[float], metric: str = "ms") -> None:
        row = shape.row(provider, operation, metric, percentiles, **origin)
        rounded = dict(zip(("p20", "p50", "p80"), map(_rounded, percentiles), strict=True))
        rows.append(replace(row, **rounded))

    origin = {name: machine[name] for name in ("torch", "triton", "commit", "time")}
    for row in (row for name in ("launches", "attention") for row in report.get(name, []) if "skipped" not in row):
        shape = Shape(row["model"], row["batch"], "bf16", 0.75, SIZES[row["model"]].sides[-1])
        if "queries" in row:
            add_row(shape, f"triton, {row['queries']} x {row['keys']}", "subset_attention", row["triton_ms"])
        else:
            for when in ("late", "early"):
                add_row(shape, f"triton, launched {when}", "a block of the last scale", row[f"{when}_ms"])
    for row in report.get("few_rows", []):
        shape = Shape(row["model"], row["batch"], "bf16", 1.0, row["side"])
        for name in (name for name in row if name.endswith("_ms")):
            launches, *early = name.removesuffix("_ms").split()
            provider = f"triton, {launches} launches{', early' if early else ''}"
            add_row(shape, provider, "a dense block", row[name])
    for row in (*report["times"], *(row for row in report["models"] if "skipped" not in row)):
        shape = Shape(row["model"], row["batch"], "bf16", 0.75, SIZES[row["model"]].sides[-1])
        if "operation" in row:
            for backend in ("triton", "reference"):
                add_row(shape, backend, row["operation"], row[f"{backend}_ms"])
            continue
        for how in ("eager", "graph"):
            if f"sample_{how}_ms" in row:
                add_row(shape, f"{row['way']}, {how}", "whole sample", row[f"sample_{how}_ms"])
        for operation, values in _block_times(row.get("blocks_graph_ms", [])).items():
            add_row(shape, f"{row['way']}, graph", operation, percentiles_of(values))
        for name, (launches, milliseconds) in row.get("kernels", {}).items():
            for metric, value in (("ms", milliseconds), ("launches", launches)):
                add_row(shape, f"{row['way']}, graph", f"kernel {name}", percentiles_of([value]), metric)
    return rows


def _block_times(runs: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Return by operation the milliseconds of every run, from those by the side of the scale."""
    found = defaultdict(list)
    for run in runs:
        for side, milliseconds in run.items():
            found[f"blocks, {side}x{side}"].append(milliseconds)
        found["blocks, last two"].append(sum(list(run.values())[-2:]))
        found["all blocks"].append(sum(run.values()))
    return found


def evaluation_rows(report: dict) -> list[Result]:
    """Return rows of the time of a batch, of each FID and of the distance by Lite0, for every method of an evaluation.

    Methods have no one rate, so theirs is the one that samples are timed at.

    Args:
        report: what `actvar evaluate --json` wrote for one of `SIZES`.
    """
    batch, model = report["settings"]["batch"], report["model"]
    shape = Shape(model, batch, report["dtype"], 0.75, SIZES[model].sides[-1])
    rows = []
    for method, found in report["methods"].items():
        milliseconds = [1e3 * batch * seconds for seconds in found["seconds_of_batches"]]
        rows.append(shape.row(method, "evaluated sample", "ms", milliseconds, torch=report["torch"]))
        for metric, name in {"FID": "fid", "FID Lite0": "fid_lite0", "distance Lite0": "distance_lite0"}.items():
            values = [of_seed[name] for of_seed in found["by_seed"] if name in of_seed]
            if values:
                rows.append(shape.row(method, "evaluated sample", metric, values, torch=report["torch"]))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("report", type=Path, help="file that `make gpu` or `actvar evaluate --json` wrote")
    report = json.loads(parser.parse_args(arguments).report.read_text())
    evaluated = "methods" in report
    path = csv_of(device_name() if evaluated else report["machine"]["gpu"])
    add(path, evaluation_rows(report) if evaluated else gpu_rows(report))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
