"""Add the options of `pytest benchmarks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.providers import SUBSETS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--subset", choices=SUBSETS, default="quick", help="shapes to time (default quick)")
    parser.addoption("--csv", type=Path, help="add the times to this file")
