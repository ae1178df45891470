"""Products in eight bits on Triton: the reference, of int8 bit for bit, and the FFN to the rounding of its GELU."""

from __future__ import annotations

import pytest
import torch
from comparison import normal
from torch import Tensor

from actvar_kernels import BackendUnavailableError, Residual, constants, expert_ffn, expert_ffn_scatter, linear
from actvar_kernels.cpu_backend.packing import drop
from actvar_kernels.expert_ffn import reference
from actvar_kernels.expert_ffn.static import static_ffn
from actvar_kernels.linear import eight_bits, tiles
from actvar_kernels.linear.quantized import quantize, quantized_linear
from actvar_kernels.scatter.reference import scatter_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
"""The interpreter computes nothing in bfloat16."""
FORMATS = pytest.mark.parametrize("quantized", constants.FORMATS.values(), ids=constants.FORMATS)
TILES = {f"{arch}, {t.rows} x {t.product.columns}": t for arch in (80, 90) for t in tiles.product_candidates(arch)}


def same(found: Tensor, due: Tensor) -> bool:
    """Return whether both are equal, NaN to NaN."""
    numbers = (x.masked_fill(x.isnan(), 0) for x in (found, due))
    return found.dtype == due.dtype and torch.equal(found.isnan(), due.isnan()) and torch.equal(*numbers)


def odd_rows(T: int, C: int, dtype: torch.dtype) -> Tensor:
    """Return rows with all that a scale may be: zero, tiny, infinite, NaN, and halves between two numbers."""
    x = normal(T, C, seed=1, dtype=dtype)
    x[0], x[1, -1], x[2, 0], x[3] = 0, torch.inf, torch.nan, 0
    x[3, 1] = torch.finfo(dtype).smallest_normal / 4
    x[4] = (torch.arange(C) % 254 - 126.5).to(dtype)
    x[4, 0] = 127
    x[5:6] = (1 + torch.arange(C) % 128 / 16).to(dtype)
    x[5:6, 0] = 448
    return x


def layer(T: int, C: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    return [odd_rows(T, C, dtype), normal(D, C, seed=2, std=C**-0.5, dtype=dtype), normal(D, seed=3, dtype=dtype)]


def ffn_weights(C: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [((D, C), C**-0.5), ((D,), 0.3), ((C, D), D**-0.5), ((C,), 0.3)]
    return [normal(*shape, seed=20 + seed, std=std, dtype=dtype) for seed, (shape, std) in enumerate(shapes)]


@DTYPES
@FORMATS
@pytest.mark.parametrize("C", [1, 72, 1030])
def test_rows_are_those_of_the_reference(dtype, quantized, C):
    x = odd_rows(9, max(C, 2), dtype)[:, :C]
    rows, (values, scales) = eight_bits.quantize_rows(x, None, quantized, recorded=False), quantize(x, quantized)
    assert torch.equal(rows.values, values)
    assert same(rows.scales, scales)


@DTYPES
@FORMATS
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_what_is_off_has_no_part_in_a_scale(dtype, quantized, experts):
    x, mask = odd_rows(9, 72, dtype), normal(9, experts, seed=4) > 0
    rows = eight_bits.quantize_rows(x, mask, quantized, recorded=False)
    values, scales = quantize(x.masked_fill(~mask.repeat_interleave(72 // experts, dim=1), 0), quantized)
    assert torch.equal(rows.values, values)
    assert same(rows.scales, scales)


@DTYPES
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("T", "C", "D"), [(150, 200, 300), (5, 33, 7)])
def test_a_layer_is_the_reference_bit_for_bit(monkeypatch, grid_order, dtype, tile, T, C, D):
    monkeypatch.setattr(tiles, "product_candidates", lambda _: [TILES[tile]])
    tensors = layer(T, C, D, dtype)
    assert same(linear(*tensors, quantized=torch.int8), quantized_linear(*tensors, torch.int8))


@DTYPES
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("T", "C", "D"), [(150, 200, 300), (9, 33, 7)])
def test_a_layer_in_fp8_has_the_error_of_float32_sums(monkeypatch, dtype, tile, T, C, D):
    monkeypatch.setattr(tiles, "product_candidates", lambda _: [TILES[tile]])
    x, weight, bias = layer(T, C, D, dtype)
    found, due = linear(x, weight, bias, torch.float8_e4m3fn), quantized_linear(x, weight, bias, torch.float8_e4m3fn)
    assert torch.equal(found.isfinite(), due.isfinite())
    finite = due.isfinite().all(1)
    assert finite.sum() == T - 2  # rows with infinity or NaN have no finite scale
    (rows, row_scales), (columns, column_scales) = (quantize(t, torch.float8_e4m3fn) for t in (x[finite], weight))
    rows, columns = rows.double() * row_scales, columns.double() * column_scales
    exact = rows @ columns.T + bias.double()
    magnitude = rows.abs() @ columns.abs().T + bias.double().abs()
    allowed = (C + 4) * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert ((found[finite].double() - exact).abs() <= allowed).all()


def test_sums_are_exact_where_float32_would_round():
    C = 3000
    x, weight = torch.full((1, C), 1.0), torch.full((5, C), 1.0)
    x[0, 0] = 126 / 127
    assert 127 * 127 * C > 2**24
    assert same(
        linear(x, weight, torch.zeros(5), quantized=torch.int8), quantized_linear(x, weight, torch.zeros(5), torch.int8)
    )


def test_a_changed_weight_is_quantized_anew():
    tensors = layer(5, 32, 16, torch.float32)
    linear(*tensors, quantized=torch.int8)
    tensors[1].mul_(-2)
    assert same(linear(*tensors, quantized=torch.int8), quantized_linear(*tensors, torch.int8))
    tensors[1].data.mul_(3)
    drop([tensors[1]])
    assert same(linear(*tensors, quantized=torch.int8), quantized_linear(*tensors, torch.int8))


@DTYPES
@FORMATS
@pytest.mark.parametrize("active", [2, 4])
def test_experts_err_as_the_reference_does(dtype, quantized, active):
    u, weights = normal(2, 40, 48, seed=5, dtype=dtype), ffn_weights(48, 96, dtype)
    mask = normal(2, 40, 4, seed=6).argsort(-1) < active
    exact = reference.expert_ffn(u.double(), mask, *(weight.double() for weight in weights))
    due = reference.quantized_expert_ffn(u, mask, *weights, quantized)
    found = expert_ffn(u, mask, active, *weights, quantized=quantized)
    # GELU is rounded in another way, so that now and then a hidden unit becomes the next number
    assert (found - due).double().norm() <= 0.2 * (due.double() - exact).norm()


@DTYPES
@FORMATS
def test_the_first_units_are_layers_of_their_own(dtype, quantized):
    u, weights = normal(30, 48, seed=5, dtype=dtype), ffn_weights(48, 96, dtype)
    first = [weights[0][:48], weights[1][:48], weights[2][:, :48], weights[3]]
    for active, of_units in ((2, first), (4, weights)):
        every = torch.ones(30, 1, dtype=torch.bool)
        exact = reference.expert_ffn(u.double(), every, *(w.double() for w in of_units))
        due = reference.quantized_expert_ffn(u, every, *of_units, quantized)
        found = static_ffn(u, active, 4, *weights, quantized=quantized)
        assert (found - due).double().norm() <= 0.2 * (due.double() - exact).norm()


@DTYPES
@FORMATS
@pytest.mark.parametrize("source", ["rows", "residual", "all rows"])
def test_the_result_goes_to_its_place_with_the_residual(dtype, quantized, source):
    R, L, K, C = 2, 30, 20, 48
    rest, u = normal(R, L, C, seed=7, dtype=dtype), normal(R, K, C, seed=8, dtype=dtype)
    weights = ffn_weights(C, 96, dtype)
    index = normal(R, L, seed=9).argsort(1)[:, :K]
    gamma = normal(R, 1, 6, C, seed=10, dtype=dtype).unbind(2)[2]
    mask = normal(R, K, 4, seed=11).argsort(-1) < 3
    rows, update = (normal(R, K, C, seed=seed, dtype=dtype) for seed in (12, 13))
    product = expert_ffn(u, mask, 3, *weights, quantized=quantized)
    arguments = dict(u=u, mask=mask, active=3, gamma=gamma, quantized=quantized)
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    arguments |= dict(zip(names, weights, strict=True))
    if source == "all rows":
        found = expert_ffn_scatter(None, None, rows, **arguments)
        exact = rows.double() + gamma.double() * product.double()
    else:
        given = rows if source == "rows" else Residual(rest.clone(), update, gamma)
        whole = rows.double() if source == "rows" else Residual(rest, update, gamma).rows(index).double()
        found = expert_ffn_scatter(given.x if isinstance(given, Residual) else rest.clone(), index, given, **arguments)
        exact = scatter_rows(rest.double(), index, whole, product.double(), gamma.double())
    assert found.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * (1 + exact.abs().max())  # the product, the sum and the residual are rounded
    assert (found.double() - exact).abs().max() <= bound


@FORMATS
def test_operators_pass_the_checks_of_pytorch(quantized):
    x, weight, bias = (tensor[:, :32] if tensor.ndim == 2 else tensor for tensor in layer(9, 64, 16, torch.float32))
    mask = normal(9, 4, seed=6) > 0
    # the check of the schema computes with all tensors, as PyTorch cannot in float8_e4m3fn
    checks = ("test_schema", "test_faketensor") if quantized == torch.int8 else ("test_faketensor",)
    torch.library.opcheck(torch.ops.actvar_kernels.quantize_rows, (x[5:], mask[5:], quantized), test_utils=checks)
    values, scales = quantize(x[5:], quantized)
    operator = torch.ops.actvar_kernels.multiply_bytes
    torch.library.opcheck(operator, (values, scales, torch.float16, weight, bias, True), test_utils=checks)
    out, gamma = torch.zeros(1, 4, 16), torch.ones(1, 1, 16)
    arguments = (out, None, torch.zeros(1, 4, 16), None, None, values, scales, weight, bias, gamma)
    torch.library.opcheck(torch.ops.actvar_kernels.multiply_bytes_scatter, arguments, test_utils=checks)


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        linear(*layer(9, 16, 5, torch.float64), quantized=torch.int8)


def test_so_many_inputs_that_a_sum_could_exceed_32_bits_are_refused(monkeypatch):
    monkeypatch.setattr(eight_bits, "MOST_INPUTS", 15)
    with pytest.raises(ValueError, match="expected at most 15 inputs in eight bits, got 16"):
        linear(*layer(9, 16, 5, torch.float32), quantized=torch.int8)
