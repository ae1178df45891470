"""The C++ attention against the reference in float64, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar_kernels import subset_attention
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import brgemm, cpu
from actvar_kernels.subset_attention import cpu_kernel, reference

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
DTYPES = cpu.DTYPES
KINDS = [pytest.param(dtype, isa, False, id=f"{dtype}-{cpu.isa_name(isa)}") for dtype in DTYPES for isa in ISAS]
if brgemm.runs(torch.bfloat16):
    KINDS.append(pytest.param(torch.bfloat16, ISAS[-1], True, id="PyTorch's products"))
SHAPES = [
    # sequences, heads, kept queries, own keys, cached keys, numbers of a head
    (2, 2, 1, 1, 0, 64),
    (1, 3, 7, 7, 5, 64),
    (2, 1, 49, 64, 91, 64),
    (1, 2, 130, 130, 3, 32),
    (3, 2, 5, 9, 17, 70),
    (1, 1, 50, 2, 130, 15),
    # more keys than a thread holds at once, in parts of which the last has one or some
    (1, 1, 50, 30, 4067, 20),
    (1, 2, 3, 1100, 4001, 64),
]


def heads(shape: tuple[int, ...], dtype: torch.dtype, normed: bool = True) -> tuple:
    """q, k, v as they come from one projection, a cache with room whose rows to come are NaN, and head scales."""
    R, H, K, T, P, d = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    q, (k, v) = normal(R, K, H, d).transpose(1, 2), normal(R, T, 2, H, d).permute(2, 0, 3, 1, 4)
    room = [torch.full((R, H, P + T + 3, d), torch.nan, dtype=dtype) for _ in range(2)]
    room[0][:, :, :P], room[1][:, :, :P] = F.normalize(normal(R, H, P, d), dim=-1), normal(R, H, P, d)
    return q, k, v, room, (torch.rand(H, generator=generator) * 4 + 1).to(dtype) if normed else None


def exact(q, k, v, room, head_scale, P: int, scale: float) -> tuple[torch.Tensor, ...]:
    past = tuple(part[:, :, :P].double() for part in room)
    normed = None if head_scale is None else head_scale.double()
    return reference.subset_attention(q.double(), k.double(), v.double(), past, normed, scale, None, None)


@pytest.mark.parametrize(("dtype", "isa", "by_pytorch"), KINDS)
@pytest.mark.parametrize("normed", [True, False], ids=["QK norm", "fixed scale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_reference_and_appends_to_the_cache(shape, normed, dtype, isa, by_pytorch):
    P, T, scale = shape[4], shape[3], 1.0 if normed else 0.25 * shape[5] ** -0.5
    q, k, v, room, head_scale = heads(shape, dtype, normed)
    expected = exact(q, k, v, room, head_scale, P, scale)
    past = tuple(part[:, :, :P] for part in room)
    plain = reference.subset_attention(q, k, v, past, head_scale, scale, None, None)
    how = dict(isa=isa, by_pytorch=by_pytorch)
    out = cpu_kernel.subset_attention(q, k, v, *room, P, head_scale, scale, append=True, **how)
    for found, wanted, by_reference in zip(
        (out, room[0][:, :, : P + T], room[1][:, :, : P + T]), expected, plain, strict=True
    ):
        error = (by_reference.double() - wanted).abs().max()
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= 4 * error + 2 * torch.finfo(dtype).eps
    assert all(part[:, :, P + T :].isnan().all() for part in room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [20, 4100], ids=["at once", "in parts"])
def test_bits_depend_on_neither_threads_nor_other_queries_and_the_cache_stays(cached, dtype):
    shape = (2, 3, 60, 60, cached, 64)
    q, k, v, room, head_scale = heads(shape, dtype)
    before = [part.clone() for part in room]

    def run(q: torch.Tensor) -> torch.Tensor:
        return cpu_kernel.subset_attention(q, k, v, *room, cached, head_scale, 1.0, append=False)

    together = run(q)
    assert torch.equal(run(q[:, :, 7:11]), together[:, 7:11])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(q), together)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(room, before, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [10, 4100], ids=["at once", "in parts"])
def test_not_a_number_stays_with_the_queries_that_see_it(cached, dtype):
    q, k, v, room, head_scale = heads((1, 2, 30, 30, cached, 64), dtype)
    clean = cpu_kernel.subset_attention(q, k, v, *room, cached, head_scale, 1.0, append=False)
    q = q.clone()
    q[0, 1, 4] = torch.nan
    found = cpu_kernel.subset_attention(q, k, v, *room, cached, head_scale, 1.0, append=False).view(1, 30, 2, 64)
    assert found[0, 4, 1].isnan().all()
    found[0, 4, 1] = clean.view(1, 30, 2, 64)[0, 4, 1]
    assert torch.equal(found.flatten(2), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_nobody_sees_leave_the_others_alone(dtype):
    """The first part of many keys has infinitely low scores."""
    q, k, v, room, _ = heads((1, 2, 5, 5, 4200, 64), dtype, normed=False)
    q = torch.cat((torch.ones_like(q[..., :1]), q[..., 1:]), dim=-1)
    room[0][:, :, :1100, 0] = -torch.inf
    found = cpu_kernel.subset_attention(q, k, v, *room, 4200, None, 0.05, append=False)
    past = tuple(part[:, :, :4200] for part in room)
    expected = exact(q, k, v, room, None, 4200, 0.05)[0]
    plain = reference.subset_attention(q, k, v, tuple(part[:, :, 1100:] for part in past), None, 0.05, None, None)[0]
    error = (plain.double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 4 * error + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("with_room", [True, False], ids=["in the room", "in a new cache"])
def test_the_operation_takes_it_by_default(with_room, monkeypatch):
    calls = []
    original = cpu_kernel.subset_attention
    monkeypatch.setattr(cpu_kernel, "subset_attention", lambda *a: calls.append(a) or original(*a))
    q, k, v, room, head_scale = heads((1, 2, 9, 9, 4, 64), torch.float32)
    past = tuple(part[:, :, :4] for part in room)
    expected = exact(q, k, v, room, head_scale, 4, 1.0)
    with torch.no_grad():
        found = subset_attention(q, k, v, past, head_scale, 1.0, room=tuple(room) if with_room else None)
        assert len(calls) == 1
        for tensor, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor.double(), wanted, atol=2e-6, rtol=0)
        masked = subset_attention(q, k, v, past, head_scale, 1.0, mask=torch.zeros(9, 13), keep_cache=False)
        assert len(calls) == 1
        torch.testing.assert_close(masked[0], found[0], atol=2e-6, rtol=0)
        with using_backend("reference"):
            subset_attention(q, k, v, past, head_scale, 1.0, keep_cache=False)
    leaf = q.clone().requires_grad_()
    subset_attention(leaf, k, v, past, head_scale, 1.0)[0].sum().backward()
    assert leaf.grad.isfinite().all()
    assert len(calls) == 1
