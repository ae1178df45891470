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


@triton.jit
def _round_and_multiply(x_ptr, values_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    place = at[:, None] * SIZE + at[None, :]
    tl.store(values_ptr + place, tl.load(x_ptr + place).to(values_ptr.dtype.element_ty))
    values = tl.load(values_ptr + place)
    tl.store(out_ptr + place, tl.dot(values, values.T))


def test_numbers_of_e4m3_are_those_of_pytorch() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].unique()
    middles, share = (finite[1:] + finite[:-1]) / 2, torch.linspace(-0.99, 0.99, 5)
    numbers = torch.cat((finite, middles, (middles[:, None] * (1 + share * 2**-6)).flatten())).clamp(-448, 448)
    x = torch.cat((numbers, numbers.new_zeros(-len(numbers) % 1024))).view(-1, 32, 32)
    for matrix in x:
        values, out = torch.empty(32, 32, dtype=torch.float8_e4m3fn), torch.empty(32, 32)
        _round_and_multiply[(1,)](matrix, values, out, 32)
        assert torch.equal(values, matrix.to(torch.float8_e4m3fn))
        assert torch.equal(out, (values.double() @ values.double().T).float())
