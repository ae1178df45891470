"""LayerNorm, modulation and residual in C++ against float64, and when they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actvar_kernels import add_normalize, add_normalize_route, cpu, cpu_rows, normalize_modulate, route_experts
from actvar_kernels.backend import using_backend
from actvar_kernels.residual_norm import reference
from actvar_kernels.token_select import reference as token_reference

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1, 1), (2, 9, 5, 65), (3, 6, 6, 192), (2, 25, 19, 1024)]
"""Sequences, tokens, kept tokens, channels."""


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "L", "K", "C"), SHAPES)
@pytest.mark.parametrize("with_index", [True, False])
def test_residual_and_norm_are_those_of_float64(R, L, K, C, dtype, with_index) -> None:
    x, index, *others = inputs(R, L, K if with_index else L, C, dtype)
    tensors = [x, index if with_index else None, *others]
    rows, u = cpu_rows.add_normalize(*tensors)
    assert rows.dtype == u.dtype == dtype
    assert_close(rows, reference.add_normalize(*wide(tensors))[0])
    # of the sum as it is stored
    scale, shift = tensors[4:]
    assert_close(u, token_reference.normalize_modulate(rows.double(), scale.double(), shift.double()))
    exact = token_reference.normalize_modulate(x.double(), scale.double(), shift.double())
    assert_close(cpu_rows.normalize_modulate(x, scale, shift), exact)


def test_sums_in_bfloat16_are_rounded_to_the_nearest_and_nan_stays_nan() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 2.0**-130, torch.nan, torch.inf]).bfloat16().view(1, 1, 6)
    update = torch.tensor([2.0**-8, 2.0**-8 + 2.0**-12, 3 * 2.0**-8, 0.0, 0.0, 0.0]).bfloat16().view(1, 1, 6)
    ones = torch.ones(1, 1, 6).bfloat16()
    rows, _ = cpu_rows.add_normalize(x, None, update, ones, ones, ones)
    expected = (x.float() + update.float()).bfloat16()
    assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert rows.isnan().tolist() == expected.isnan().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_depends_neither_on_threads_nor_on_strides_nor_on_the_other_rows(dtype: torch.dtype) -> None:
    x, index, update, *vectors = inputs(3, 9, 5, 65, dtype)
    expected = cpu_rows.add_normalize(x, index, update, *vectors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        assert all(map(torch.equal, cpu_rows.add_normalize(x, index, update, *vectors), expected))
    finally:
        torch.set_num_threads(threads)
    views = torch.cat((x * torch.nan, x, x), dim=1)[:, 9:18], index.t().contiguous().t()
    assert all(map(torch.equal, cpu_rows.add_normalize(*views, update, *vectors), expected))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(map(torch.equal, cpu_rows.add_normalize(apart, index, update, *vectors), expected))
    x[torch.ones(3, 9, dtype=torch.bool).scatter(1, index, False)] = torch.nan  # must not be read
    assert all(map(torch.equal, cpu_rows.add_normalize(x, index, update, *vectors), expected))


def test_the_operations_take_the_code_on_the_cpu_and_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    launch = cpu_rows._launch
    monkeypatch.setattr(cpu_rows, "_launch", lambda *args: calls.append(1) or launch(*args))
    tensors = inputs(2, 9, 5, 64, torch.float32)
    x, scale, shift = tensors[0], tensors[4], tensors[5]
    weight, bias = normal(4, 64, seed=5), normal(4, seed=6)
    for backend in ("auto", "cpu"):
        with using_backend(backend):
            normalize_modulate(x, scale, shift)
            rows, u = add_normalize(*tensors)
            routed = add_normalize_route(*tensors, weight, bias, 3)
    assert len(calls) == 6
    assert torch.equal(routed.rows, rows)
    assert torch.equal(routed.u, u)
    assert torch.equal(routed.mask, route_experts(u, weight, bias, 3)[0])
    with using_backend("reference"):
        normalize_modulate(x, scale, shift)
    normalize_modulate(x.double(), scale, shift)
    normalize_modulate(x.requires_grad_(), scale, shift)
    assert len(calls) == 6


def test_under_autocast_an_update_in_bfloat16_is_added_to_rows_in_float32() -> None:
    x, index, update, *vectors = inputs(2, 9, 5, 65, torch.float32)
    rows, u = cpu_rows.add_normalize(x, index, update.bfloat16(), *vectors)
    assert rows.dtype == u.dtype == torch.float32
    exact = reference.add_normalize(*wide([x, index, update.bfloat16(), *vectors]))[0]
    assert_close(rows, exact)
