"""Measure the adapters behind the paper's tables and write the page about them: `python -m benchmarks.paper`.

Adapters that were measured before are not measured again. Rows whose adapters are not there stay as
docs/paper/results.csv has them; those that it lacks are said to be missing.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from actvar.reports.figures import FIGURES
from benchmarks.paper.measure import load_measured, measure_all, save_measured
from benchmarks.paper.page import write_page
from benchmarks.paper.train import add_arguments


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser("python -m benchmarks.paper", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of paper.md (default docs)")
    parser.add_argument("--num", type=int, default=5000, help="images per adapter; 0: KL alone (default 5000)")
    options = parser.parse_args(arguments)
    folder = options.out / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "results.csv"
    known = load_measured(table) if table.exists() else []
    measured = measure_all(options.work, options.data, options.num, options.device, options.processes, known)
    save_measured(measured, table)
    for path in write_page(measured, options.out):
        print(f"wrote {path}")
    for draw in FIGURES.values():
        draw(folder)


if __name__ == "__main__":
    main()
