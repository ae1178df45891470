"""The fixtures of this folder do what the other tests rely on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count_visits(visits, order, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0) * COLUMNS + tl.program_id(1)
    number = tl.load(visits)
    tl.store(order + program, number)
    tl.store(visits, number + 1)


def test_every_program_runs_once_in_the_order_of_its_name(grid_order: str) -> None:
    visits, order = torch.zeros(1, dtype=torch.int32), torch.full((12,), -1, dtype=torch.int32)
    _count_visits[(3, 4)](visits, order, 3, 4)
    assert sorted(order.tolist()) == list(range(12))
    assert (order.tolist() == list(range(12))) == (grid_order == "in order")


def test_fresh_memory_is_nan_or_the_largest_integer() -> None:
    x = torch.ones(3, dtype=torch.float16)
    for fresh in (torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2, 2), (1, 2))):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
