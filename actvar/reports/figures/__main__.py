"""Draw the paper's figures on the bundled model, as PNG with the numbers as CSV: `python -m actvar.reports.figures`."""

from __future__ import annotations

import argparse
from pathlib import Path

from actvar.reports.figures import FIGURES

DESCRIPTION = "Draw the paper's figures on the bundled model, as PNG with the numbers as CSV"


def main(arguments: list[str] | None = None) -> None:
    """Draw the figures that the command line asks for."""
    parser = argparse.ArgumentParser("python -m actvar.reports.figures", description=DESCRIPTION)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/paper"), help="folder (default docs/paper)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.figures:
        for path in FIGURES[name](options.out):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
