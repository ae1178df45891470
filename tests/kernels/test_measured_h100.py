"""The predicted times beside those that an H100 measured, from the launches of the commit that was measured.

`tests/data/launches-h100.csv` holds what `benchmarks.roofline.work_of` gives for one sample of d16 at commit c90148e,
transformer and decoder in bfloat16, as `benchmarks.virtual_gpu` recorded it. Equal launches are one row with a count.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.results import csv_of, read
from benchmarks.roofline import CARDS, Work, work_seconds

LAUNCHES = Path(__file__).parent.parent / "data" / "launches-h100.csv"
MEASURED = csv_of("NVIDIA H100 80GB HBM3")
ERROR = 0.1
LAST_CONVOLUTION_MS = 26.3
"""Hold the time of the last convolution of 64 images, measured by name at that commit."""


def predicted_ms(way: str, batch: int, part: str) -> float:
    """Return the predicted milliseconds of a part of one sample."""
    with LAUNCHES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part and row["batch"] == str(batch)]
    works = [(int(row["count"]), work(row)) for row in rows if row["way"] in (way, "both")]
    assert works
    return 1e3 * sum(count * work_seconds(launch, CARDS["h100"]) for count, launch in works)


def work(row: dict[str, str]) -> Work:
    """Return the `Work` of a row."""
    rows, _, columns = row["tile"].partition("x")
    numbers = ("launches", "bytes", "flops", "programs", "instructions", "rows", "columns", "results")
    return Work(
        name=row["name"],
        dtype=getattr(torch, row["dtype"]) if row["dtype"] else None,
        tile=(int(rows), int(columns)) if row["tile"] else None,
        attention=row["attention"] == "1",
        **{name: int(row[name]) for name in numbers},
    )


def measured_ms(way: str, batch: int, operation: str) -> float:
    """Return the median that the H100 measured."""
    (found,) = (
        row.p50
        for row in read(MEASURED)
        if (row.provider, row.operation, row.batch, row.model) == (f"{way}, graph", operation, batch, "d16")
    )
    return found


@pytest.mark.parametrize("way", ["dense", "ActVAR"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_blocks_and_the_rest_of_a_sample_are_predicted_within_ten_percent(way, batch):
    blocks, rest, decoder = (predicted_ms(way, batch, part) for part in ("blocks", "rest", "decoder"))
    whole, all_blocks = measured_ms(way, batch, "whole sample"), measured_ms(way, batch, "all blocks")
    assert blocks == pytest.approx(all_blocks, rel=ERROR)
    assert decoder + rest == pytest.approx(whole - all_blocks, rel=ERROR)
    assert blocks + rest + decoder == pytest.approx(whole, rel=ERROR)


def test_the_last_convolution_without_tensor_cores_is_predicted():
    with LAUNCHES.open(newline="") as file:
        (last,) = (work(row) for row in csv.DictReader(file) if (row["batch"], row["columns"]) == ("64", "8"))
    assert 1e3 * work_seconds(last, CARDS["h100"]) == pytest.approx(LAST_CONVOLUTION_MS, rel=ERROR)


def test_the_recorded_sample_has_the_launches_that_the_card_ran():
    with LAUNCHES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter()
    for row in rows:
        counts[row["way"], row["batch"], row["part"]] += int(row["count"]) * int(row["launches"])
    for batch in ("1", "8", "64"):
        assert counts["dense", batch, "blocks"] == 1360
        assert counts["both", batch, "decoder"] == 279
