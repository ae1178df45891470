"""Time every operation of a block by pytest-benchmark: `python -m pytest benchmarks --subset cpu`.

The providers of an operation are measured in turn, so that what else the machine does meets all of them alike; each
provider's test then hands its times to pytest-benchmark, whose clock they move.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from actvar_kernels.cpu_backend import cpu
from benchmarks import results
from benchmarks.providers import SUBSETS, Case, measure, names, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Replay:
    """Tell the time; every call of `advance` moves it by the next of some seconds."""

    def __init__(self):
        self.now, self.seconds = 0.0, []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        if self.seconds:
            self.now += self.seconds.pop(0)


clock = Replay()


@functools.lru_cache(maxsize=1)
def measured(case: Case, csv: Path | None) -> dict[str, dict[str, list[float]]]:
    seconds = measure(case, DEVICE)
    if csv is not None:
        results.add(csv, rows(case, seconds))
    return seconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = () if DEVICE == "cuda" or cpu.multiplies_bfloat16() else ("bf16",)
    cases = [
        pytest.param(case, *names_of, id=f"{case}, {', '.join(names_of)}")
        for case in SUBSETS[metafunc.config.getoption("subset")]
        if case.dtype not in slow
        for names_of in names(case, DEVICE)
    ]
    metafunc.parametrize(("case", "operation", "provider"), cases)


@pytest.mark.benchmark(timer=clock)
def test_operation(case, operation, provider, benchmark, request):
    clock.seconds = list(measured(case, request.config.getoption("csv"))[operation][provider])
    benchmark.group = f"{case}: {operation}"
    benchmark.pedantic(clock.advance, rounds=len(clock.seconds))
