"""Rows after a norm in the form that the next layer reads: those of the plain operation, rounded or in eight bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import normal
from torch import Tensor

from actvar_kernels import add_normalize, add_normalize_route, select_tokens
from actvar_kernels.constants import FORMATS
from actvar_kernels.linear.quantized import quantize
from actvar_kernels.token_select.op import normalize_modulate
from actvar_kernels.triton_backend.row_form import ByteRows, RowForm

R, L, K, C = 2, 13, 9, 72
STREAMS = pytest.mark.parametrize(
    ("stream", "dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float16)],
    ids=["float32", "float16", "float16 of a float32 stream"],
)


def part(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return normal(*shape, seed=seed, dtype=dtype)


def calls(dtype: torch.dtype) -> dict[str, Callable[[RowForm | None], tuple]]:
    """Return for each operation a function of a form, which returns the rows and all other results."""
    x, update = part(1, R, L, C, dtype=dtype), part(2, R, K, C, dtype=dtype)
    gamma, scale, shift = (part(seed, R, 1, C, dtype=dtype) for seed in (3, 4, 5))
    index = normal(R, L, seed=6).argsort(1)[:, :K]
    gate = part(7, 4, C, dtype=torch.float32), part(8, 4, dtype=torch.float32)
    x[0, 0, 0] = torch.nan

    def select(form: RowForm | None) -> tuple:
        chosen = select_tokens(x, gate[0][:1], gate[1][:1], scale, shift, K, form=form)
        return chosen.modulated, chosen.index, chosen.scores

    def add(form: RowForm | None) -> tuple:
        rows, u = add_normalize(x, index, update, gamma, scale, shift, form)
        return u, rows

    def route(form: RowForm | None) -> tuple:
        routed = add_normalize_route(x, index, update, gamma, scale, shift, *gate, 2, form=form)
        return routed.u, routed.rows, routed.mask, routed.logits

    def normalize(form: RowForm | None) -> tuple:
        return (normalize_modulate(x, scale, shift, form=form),)

    return {"normalize": normalize, "select": select, "add": add, "route": route}


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(7), second.nan_to_num(7))


@STREAMS
@pytest.mark.parametrize("name", ["normalize", "select", "add", "route"])
def test_rows_are_those_of_the_plain_operation(stream, dtype, name):
    call = calls(stream)[name]
    plain, *others = call(None)
    rows, *same_others = call(RowForm(dtype))
    assert same(rows, plain.to(dtype))
    assert all(map(same, same_others, others))
    for quantized in FORMATS.values():
        in_bytes, *byte_others = call(RowForm(dtype, quantized))
        values, scales = quantize(plain.to(dtype), quantized)
        assert isinstance(in_bytes, ByteRows)
        assert torch.equal(in_bytes.values, values)
        assert same(in_bytes.scales, scales)
        assert in_bytes.dtype == dtype
        assert all(map(same, byte_others, others))


def test_with_gradients_rows_are_in_their_dtype_alone():
    x, scale, shift = (part(seed, R, 1, C, dtype=torch.float32).requires_grad_() for seed in (1, 2, 3))
    rows = normalize_modulate(x, scale, shift, form=RowForm(torch.float16, torch.int8))
    assert isinstance(rows, Tensor)
    assert rows.dtype == torch.float16
    rows.float().square().sum().backward()
    assert x.grad.isfinite().all()


def test_operators_pass_the_checks_of_pytorch():
    x, update = part(1, R, L, C, dtype=torch.float32), part(2, R, L, C, dtype=torch.float32)
    gamma, scale, shift = (part(seed, R, 1, C, dtype=torch.float32) for seed in (3, 4, 5))
    weight, bias = part(7, 4, C, dtype=torch.float32), part(8, 4, dtype=torch.float32)
    operators, checks = torch.ops.actvar_kernels, ("test_schema", "test_faketensor")
    for form in (RowForm(torch.float16), *(RowForm(torch.float16, quantized) for quantized in FORMATS.values())):
        adaln = (gamma, scale, shift)
        arguments = {
            operators.normalize_modulate_as: (x, scale, shift),
            operators.select_tokens_as: (x, weight[:1], bias[:1], scale, shift, K, False, True),
            operators.add_normalize_as: (x, None, update, *adaln),
            operators.add_normalize_route_as: (x, None, update, *adaln, weight, bias, 2, True),
        }
        for operator, given in arguments.items():
            torch.library.opcheck(operator, (*given, *form), test_utils=checks)
