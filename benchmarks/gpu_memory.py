"""Count what a sample of VAR on a GPU keeps beside its activations: `python -m benchmarks.gpu_memory --json FILE`.

The numbers follow from shapes and dtypes: weights and K/V cache in bfloat16, and the copies that
`Execution(weights="int8")` adds to the weights. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.reports.flops import shapes_of
from actvar.reports.infinity.memory import eight_bit_bytes
from actvar.sparse.schedule import build_schedule
from benchmarks.memory import MIB

MODELS, BATCHES = ("d16", "d20", "d24", "d30", "d36"), (1, 8, 64)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    rows = [row for model in MODELS for row in rows_of(model)]
    for row in rows:
        print(
            "  ".join(f"{name} {value:.0f}" if isinstance(value, float) else str(value) for name, value in row.items())
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def rows_of(model: str) -> list[dict[str, object]]:
    """Return MiB of each part for every batch, with guidance, so two sequences an image."""
    _, var = shapes_of(model)
    family, dtype = family_of(var), torch.bfloat16
    weights = sum(parameter.numel() for parameter in var.parameters()) * dtype.itemsize
    rows = []
    for batch in BATCHES:
        row: dict[str, object] = {"model": model, "batch": batch, "weights": weights / MIB}
        row["int8"] = eight_bit_bytes(var) / MIB
        for way, config in (("dense", DENSE), ("ActVAR", ActVARConfig())):
            last = build_schedule(config, family.maps(var))[-1]
            row[way] = len(family.blocks(var)) * 2 * 2 * batch * last.cached_before * var.C * dtype.itemsize / MIB
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
