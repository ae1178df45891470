"""Selection, LayerNorm, modulation, residual and routing in C++ against float64, and when they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actvar_kernels import add_normalize, add_normalize_route, normalize_modulate, scatter_rows, select_tokens
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu, row_ops
from actvar_kernels.residual_norm import reference
from actvar_kernels.scatter import reference as scatter_reference
from actvar_kernels.token_select import reference as token_reference

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
DTYPES = cpu.DTYPES
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (2, 9, 5, 65), (3, 6, 6, 192), (2, 25, 19, 1024)]
"""Sequences, tokens, kept tokens, channels."""


@pytest.fixture(params=ISAS, ids=cpu.isa_name)
def every_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "best_isa", lambda: request.param)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(R: int, L: int, K: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """x, index, update; gamma, scale and shift as a block has them, views of one tensor."""
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(L, generator=generator)[:K] for _ in range(R)])
    modulation = normal(R, 1, 6, C, seed=2, dtype=dtype).unbind(2)
    x, update = normal(R, L, C, dtype=dtype), normal(R, K, C, seed=1, dtype=dtype)
    return [x, index, update, modulation[0], modulation[3], modulation[5]]


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """To one rounding of the result, and float32's in between."""
    rounding = torch.finfo(actual.dtype).eps / 2 if actual.dtype != torch.float32 else 0.0
    assert ((actual.double() - exact).abs() <= rounding * exact.abs() + 2e-5).all()


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "K", "C"), SHAPES)
@pytest.mark.parametrize("with_index", [True, False])
def test_residual_and_norm_are_those_of_float64(R, L, K, C, dtype, with_index) -> None:
    x, index, *others = inputs(R, L, K if with_index else L, C, dtype)
    tensors = [x, index if with_index else None, *others]
    rows, u = row_ops.add_normalize(*tensors)
    assert rows.dtype == u.dtype == dtype
    assert_close(rows, reference.add_normalize(*wide(tensors))[0])
    # of the sum as it is stored
    scale, shift = tensors[4:]
    assert_close(u, token_reference.normalize_modulate(rows.double(), scale.double(), shift.double()))
    exact = token_reference.normalize_modulate(x.double(), scale.double(), shift.double())
    assert_close(row_ops.normalize_modulate(x, scale, shift), exact)


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_of_16_bits_is_read_and_stored_as_it_is(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, 1, -1)
    numbers, zeros = bits.view(dtype), torch.zeros(1, 1, 2**16)
    stored = torch.empty_like(numbers)
    row_ops.scatter_rows(stored, None, numbers, zeros.to(dtype), -zeros)  # -0 leaves 0 and -0 as they are
    assert torch.equal(stored.isnan(), numbers.isnan())
    assert torch.equal(stored.view(torch.int16)[~numbers.isnan()], bits[~numbers.isnan()])


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_is_rounded_to_16_bits_as_pytorch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    ties = bits[: 2**14, None] // 2**16 * 2**16 + torch.tensor([0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x3000])
    near = torch.randn(2**15, generator=generator) * 2.0 ** torch.randint(-27, 18, (2**15,), generator=generator)
    bits_near = near.view(torch.int32) // 2**13 * 2**13
    steps = torch.cat([bits_near + step for step in (0xFFF, 0x1000, 0x1001)])
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 0.0, -0.0, torch.inf])
    numbers = torch.cat([bits, ties.flatten().int(), steps.int()]).view(torch.float32)
    numbers = torch.cat([numbers, near, edges, -edges]).view(1, 1, -1)
    stored = torch.empty(numbers.shape, dtype=dtype)
    row_ops.scatter_rows(stored, None, -torch.zeros_like(stored), torch.ones_like(stored), numbers)
    torch.testing.assert_close(stored, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_sums_in_bfloat16_are_rounded_to_the_nearest_and_nan_stays_nan() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 2.0**-130, torch.nan, torch.inf]).bfloat16().view(1, 1, 6)
    update = torch.tensor([2.0**-8, 2.0**-8 + 2.0**-12, 3 * 2.0**-8, 0.0, 0.0, 0.0]).bfloat16().view(1, 1, 6)
    ones = torch.ones(1, 1, 6).bfloat16()
    rows, _ = row_ops.add_normalize(x, None, update, ones, ones, ones)
    expected = (x.float() + update.float()).bfloat16()
    assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert rows.isnan().tolist() == expected.isnan().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_depends_neither_on_threads_nor_on_strides_nor_on_the_other_rows(dtype: torch.dtype) -> None:
    x, index, update, *vectors = inputs(3, 9, 5, 65, dtype)
    expected = row_ops.add_normalize(x, index, update, *vectors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        assert all(map(torch.equal, row_ops.add_normalize(x, index, update, *vectors), expected))
    finally:
        torch.set_num_threads(threads)
    views = torch.cat((x * torch.nan, x, x), dim=1)[:, 9:18], index.t().contiguous().t()
    assert all(map(torch.equal, row_ops.add_normalize(*views, update, *vectors), expected))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(torch.equal, row_ops.add_normalize(apart, index, update, *vectors), expected))
    x[torch.ones(3, 9, dtype=torch.bool).scatter(1, index, False)] = torch.nan  # must not be read
    assert all(map(torch.equal, row_ops.add_normalize(x, index, update, *vectors), expected))


def test_the_operations_take_the_code_on_the_cpu_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    library = row_ops._library
    monkeypatch.setattr(row_ops, "_library", lambda: calls.append(1) or library())
    tensors = inputs(2, 9, 5, 64, torch.float32)
    x, index, update, gamma, scale, shift = tensors
    weight, bias = normal(4, 64, seed=5), normal(4, seed=6)

    def everything() -> list[Tensor]:
        selected = select_tokens(x, weight[:1], bias[:1], scale, shift, 5)
        routed = add_normalize_route(*tensors, weight, bias, 3)
        rest = scatter_rows(selected.rest, index, routed.rows, update, gamma)
        every = scatter_rows(None, None, routed.rows, update, gamma)
        alone = normalize_modulate(x, scale, shift), *add_normalize(*tensors)
        return [selected.index, selected.modulated, selected.scores, *routed, rest, every, *alone]

    before = x.clone()
    found = [everything()]
    for backend in ("cpu", "reference"):
        with using_backend(backend):
            found.append(everything())
    assert len(calls) == 12
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert torch.equal(x, before)
    x.requires_grad_()
    assert everything()[1].requires_grad
    assert len(calls) == 12


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "K", "C"), [*SHAPES, (4, 300, 225, 130)])
@pytest.mark.parametrize("shared", [False, True])
def test_the_highest_scores_are_kept_and_their_rows_modulated(R, L, K, C, dtype, shared) -> None:
    R += R % 2
    x, _, _, _, scale, shift = inputs(R, L, K, C, dtype)
    weight, bias = normal(1, C, seed=5, dtype=dtype), normal(1, seed=6, dtype=dtype)
    index, modulated, scores = row_ops.select_tokens(x, weight, bias, scale, shift, K, shared)
    exact = token_reference.select_tokens(*wide([x, weight, bias, scale, shift]), K, shared)[2]
    torch.testing.assert_close(scores.double(), exact.double(), rtol=1e-5, atol=2e-6 * C**0.5)
    deciding = scores[: R // 2].repeat(2, 1) if shared else scores
    assert torch.equal(index, token_reference.top_indices(deciding, K))
    rows = token_reference.gather_rows(x, index)
    assert torch.equal(modulated, row_ops.normalize_modulate(rows, scale, shift))


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8, 9])
def test_equal_scores_go_to_the_lower_index_and_nan_comes_first(keep: int) -> None:
    x = normal(1, 3, 64).repeat(2, 3, 1)
    x[1, 4] = x[1, 7] = torch.nan
    x[1, 2] = torch.inf
    ones = torch.ones(2, 1, 64)
    index, _, scores = row_ops.select_tokens(x, normal(1, 64), torch.zeros(1), ones, ones, keep, False)
    assert scores[0].unique().numel() == 3
    assert torch.equal(index, token_reference.top_indices(scores, keep))


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "K", "C"), SHAPES)
@pytest.mark.parametrize(("experts", "active"), [(1, 1), (16, 12), (40, 7)])
def test_the_router_reads_the_rows_as_they_are_stored(R, L, K, C, experts, active, dtype) -> None:
    tensors = inputs(R, L, K, C, dtype)
    weight, bias = normal(experts, C, seed=5, dtype=dtype), normal(experts, seed=6, dtype=dtype)
    weight[experts // 2 :] = weight[: experts - experts // 2]  # equal logits
    bias[experts // 2 :] = bias[: experts - experts // 2]
    rows, u, mask, logits = row_ops.add_normalize_route(*tensors, weight, bias, active)
    assert all(map(torch.equal, (rows, u), row_ops.add_normalize(*tensors)))
    exact = u.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=2e-6 * C**0.5)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :active]
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, chosen, True))


def test_experts_of_a_row_that_is_not_a_number_are_those_of_the_reference() -> None:
    tensors = inputs(1, 6, 6, 64, torch.float32)
    tensors[0][0, 3, 5] = torch.nan
    weight, bias = normal(8, 64, seed=5), normal(8, seed=6)
    expected = reference.add_normalize_route(*tensors, weight, bias, 3)
    for found, wanted in zip(row_ops.add_normalize_route(*tensors, weight, bias, 3), expected, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.usefixtures("every_level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "K", "C"), SHAPES)
def test_updated_rows_are_put_back_and_no_other_row_is_touched(R, L, K, C, dtype) -> None:
    rest, index, update, gamma, *_ = inputs(R, L, K, C, dtype)
    rows = normal(R, K, C, seed=8, dtype=dtype)
    before = rest.clone()
    with torch.no_grad():
        found = scatter_rows(rest, index, rows, update, gamma)
    assert found is rest
    exact = scatter_reference.scatter_rows(*wide([before, index, rows, update, gamma]))
    assert_close(found, exact)
    others = torch.ones(R, L, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(found[others], before[others])
    every = scatter_rows(None, None, rows, update, gamma)
    assert torch.equal(every, token_reference.gather_rows(found, index))
    views = before.mT.contiguous().mT  # is copied
    assert_close(scatter_rows(views, index, rows, update, gamma), exact)
    assert torch.equal(views, before)


def test_selection_and_routing_depend_neither_on_threads_nor_on_strides() -> None:
    x, index, update, *vectors = inputs(4, 30, 20, 70, torch.bfloat16)
    weight, bias = normal(6, 70, seed=5), normal(6, seed=6)
    apart = x.mT.contiguous().mT
    threads = torch.get_num_threads()
    found = []
    try:
        for count, rows in ((1, x), (2, x), (3, apart), (3, torch.cat((x, x), dim=1)[:, 30:])):
            torch.set_num_threads(count)
            selected = row_ops.select_tokens(rows, weight[:1], bias[:1], *vectors[1:], 20, False)
            routed = row_ops.add_normalize_route(rows, index, update, *vectors, weight, bias, 4)
            found.append((*selected, *routed))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_under_autocast_an_update_in_bfloat16_is_added_to_rows_in_float32() -> None:
    x, index, update, *vectors = inputs(2, 9, 5, 65, torch.float32)
    rows, u = row_ops.add_normalize(x, index, update.bfloat16(), *vectors)
    assert rows.dtype == u.dtype == torch.float32
    exact = reference.add_normalize(*wide([x, index, update.bfloat16(), *vectors]))[0]
    assert_close(rows, exact)
