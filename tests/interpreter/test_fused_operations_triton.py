"""Launches in Triton's interpreter are counted as those on a GPU are."""

from __future__ import annotations

import torch

from actvar_kernels import scatter_rows
from benchmarks.fused import fused_operations


def test_launches_in_the_interpreter_are_counted() -> None:
    index = torch.tensor([[0, 2]])
    rows, gamma = torch.ones(1, 2, 8), torch.ones(1, 1, 8)
    assert fused_operations(lambda: scatter_rows(torch.ones(1, 4, 8), index, rows, rows, gamma)) == {"_scatter_rows": 1}
