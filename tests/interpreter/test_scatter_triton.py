"""Scatter on Triton, in place and as an operator with gradients, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import assert_close, exact_and_tolerance, normal
from torch import Tensor

from actvar_kernels import BackendUnavailableError, scatter_rows, select_tokens
from actvar_kernels.scatter import reference, triton_kernel
from actvar_kernels.triton_backend.tiles import RowTiles

SHAPES = [(1, 1, 20, 1), (2, 16, 192, 12), (3, 25, 65, 1), (2, 7, 20, 7)]
"""Rows, tokens, width, updated tokens."""


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "row_tiles", lambda tokens, width: RowTiles(4, warps=4))


def inputs(R: int, L: int, C: int, keep: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """rest, index, rows, update; gamma as a block has it, a view."""
    index = normal(R, L, seed=9).argsort(dim=1)[:, :keep]
    rest, rows = normal(R, L, C, dtype=dtype), normal(R, keep, C, seed=1, dtype=dtype)
    update, modulation = normal(R, keep, C, seed=2, dtype=dtype), normal(R, 1, 6, C, seed=3, dtype=dtype)
    return [rest, index, rows, update, modulation[:, :, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("R", "L", "C", "keep"), SHAPES)
def test_scatter_rows_in_place_and_in_any_grid_order(
    R: int, L: int, C: int, keep: int, dtype: torch.dtype, grid_order: str
) -> None:
    rest, index, rows, update, gamma = inputs(R, L, C, keep, dtype)
    before = rest.clone()
    exact, tolerance = exact_and_tolerance(reference.scatter_rows, rest, index, rows, update, gamma)
    out = scatter_rows(rest, index, rows, update, gamma)
    assert out is rest
    assert_close(out, exact, tolerance)
    untouched = torch.ones(R, L, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(out[untouched], before[untouched])


def test_rows_without_value_are_filled_and_nothing_else_is_read() -> None:
    rest, index, rows, update, gamma = inputs(2, 9, 20, 5)
    expected = scatter_rows(rest.clone(), index, rows, update, gamma)
    rest.scatter_(1, index.unsqueeze(-1).expand(-1, -1, 20), torch.nan)
    assert torch.equal(scatter_rows(rest, index, rows, update, gamma), expected)


def test_views_give_what_copies_give() -> None:
    rest, index, rows, update, gamma = inputs(2, 9, 20, 5)
    expected = scatter_rows(rest.clone(), index, rows, update, gamma.clone())
    room = torch.full((2, 12, 3, 20), torch.nan)
    view = room[:, 2:11, 1]
    view.copy_(rest)
    rows, update = (torch.cat((t * torch.nan, t), dim=1)[:, 5:] for t in (rows, update))
    index = torch.stack((index, index * 1000), dim=-1)[..., 0]
    assert torch.equal(scatter_rows(view, index, rows, update, gamma), expected)
    view.fill_(torch.nan)
    assert room.isnan().all(), "nothing outside the view is written to"


def test_sequences_that_are_apart_by_the_batch_stride_only() -> None:
    rest, index, rows, update, gamma = inputs(3, 6, 20, 4)
    expected = scatter_rows(rest.clone(), index, rows, update, gamma)
    turned = rest.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(scatter_rows(turned, index, rows, update, gamma), expected)


def test_update_and_gate_may_be_of_another_dtype_than_the_rows() -> None:
    rest, index, rows, update, gamma = inputs(2, 9, 20, 5)
    update, gamma = update.half(), gamma.half()
    exact = reference.scatter_rows(
        *(t.double() if t.is_floating_point() else t for t in (rest, index, rows, update, gamma))
    )
    tolerance = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    out = scatter_rows(rest, index, rows, update, gamma)
    assert out.dtype == torch.float32
    assert_close(out, exact, tolerance)


def test_bfloat16_is_added_in_float32_and_rounded_once() -> None:
    rest, index, rows, update, gamma = inputs(2, 9, 192, 9, torch.bfloat16)
    out = scatter_rows(rest, index, rows, update, gamma)
    exact = torch.empty(2, 9, 192, dtype=torch.float64)
    sums = rows.double() + gamma.double() * update.double()
    exact.scatter_(1, index.unsqueeze(-1).expand(-1, -1, 192), sums)
    # the interpreter cuts bfloat16 off where a GPU rounds it: an error of up to 2^-7 instead of 2^-8
    assert ((out.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()


def test_what_was_selected_goes_back_to_where_it_came_from() -> None:
    x = normal(2, 9, 20, dtype=torch.float32)
    weight, bias, modulation = normal(1, 20, seed=1).float(), torch.zeros(1), torch.zeros(2, 1, 20)
    selection = select_tokens(x, weight, bias, modulation, modulation, 6)
    rows = torch.stack([x[row, kept] for row, kept in enumerate(selection.index)])
    out = scatter_rows(selection.rest, selection.index, rows, rows, modulation)
    assert torch.equal(out, x)


def test_the_operators_pass_the_checks_of_torch() -> None:
    rest, index, rows, update, gamma = inputs(2, 4, 8, 3)
    operators = torch.ops.actvar_kernels
    torch.library.opcheck(operators.scatter_rows_.default, (rest, index, rows, update, gamma))
    leaves = [t.detach().requires_grad_() for t in (rest, rows, update, gamma)]
    torch.library.opcheck(operators.scatter_rows.default, (leaves[0], index, *leaves[1:]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_gives_the_same(backend: str) -> None:
    rest, *others = inputs(2, 4, 8, 3)

    @torch.compile(backend=backend, fullgraph=True)
    def compiled(rest: Tensor, *others: Tensor) -> Tensor:
        return scatter_rows(rest * 1, *others) + 1

    assert torch.equal(compiled(rest, *others), scatter_rows(rest * 1, *others) + 1)


def test_with_gradients_rest_stays_as_it_is() -> None:
    rest, index, rows, update, gamma = inputs(2, 6, 20, 4)
    before, expected = rest.clone(), scatter_rows(rest.clone(), index, rows, update, gamma)
    out = scatter_rows(rest, index, rows.requires_grad_(), update, gamma)
    assert torch.equal(rest, before)
    assert torch.equal(out, expected)


def test_the_gradients_are_those_of_the_reference() -> None:
    rest, index, *others = inputs(2, 6, 20, 4)

    def gradients(scatter: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (rest, *others)]
        output = scatter(leaves[0], index, *leaves[1:])
        return torch.autograd.grad(output, leaves, normal(*output.shape, seed=99).float())

    assert all(map(torch.equal, gradients(scatter_rows), gradients(reference.scatter_rows)))


def test_what_triton_cannot_run_raises_when_it_is_asked_for_by_name() -> None:
    rest, index, *others = inputs(1, 2, 4, 1)
    with pytest.raises(BackendUnavailableError, match=r"scatter_rows .*float32, float16 and bfloat16"):
        scatter_rows(rest.double(), index, *others)
