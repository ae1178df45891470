"""GroupNorm and SiLU in C++ against float64, for every instruction set that this processor has."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from actvar_kernels import group_norm_silu
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.group_norm import cpu_kernel, reference

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
SHAPES = [
    # images, channels, height, width, groups
    (1, 16, 1, 1, 1),
    (2, 16, 1, 3, 16),
    (3, 48, 7, 9, 3),
    (2, 160, 8, 8, 32),
    (1, 96, 33, 31, 32),
]
DTYPES = cpu.DTYPES


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def inputs(B, C, H, W, dtype=torch.float32, mean=0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=generator) + mean
    return x.to(dtype), torch.randn(C, generator=generator), torch.randn(C, generator=generator)


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_errs_at_most_four_times_as_much_as_the_reference(shape, silu, dtype, isa):
    *sizes, groups = shape
    for mean in (0.5, 300.0):  # the second beside a deviation of 1
        x, weight, bias = inputs(*sizes, dtype, mean)
        exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
        exact = F.silu(exact) if silu else exact
        found = cpu_kernel.group_norm_silu(x, weight, bias, groups, 1e-6, silu, False, isa=isa)
        known = reference.group_norm_silu(x, weight, bias, groups, 1e-6, silu, None)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= 4 * (known.double() - exact).abs().max() + unit / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_depends_neither_on_threads_nor_on_the_memory_format_nor_on_the_other_images(dtype):
    x, *vectors = inputs(3, 32, 20, 18, dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [group_norm_silu(x.contiguous(memory_format=f), *vectors, 8, 1e-6) for f in FORMATS]
            found.append(torch.cat([group_norm_silu(image, *vectors, 8, 1e-6) for image in x.split(1)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


FORMATS = (torch.contiguous_format, torch.channels_last)


def test_it_takes_the_place_of_x_only_where_that_is_not_needed():
    x, *vectors = inputs(2, 32, 6, 6)
    x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    kept = group_norm_silu(x, *vectors, 8, 1e-6)
    assert torch.equal(x, before)
    found = group_norm_silu(x, *vectors, 8, 1e-6, overwrite=True)
    assert found.data_ptr() == x.data_ptr()
    assert torch.equal(found, kept)


def test_numbers_that_are_not_finite_stay_in_their_image_and_group():
    x, *vectors = inputs(2, 32, 5, 5)
    alone = group_norm_silu(x, *vectors, 4, 1e-6)
    x[0, 3, 2, 2] = torch.nan
    found = group_norm_silu(x, *vectors, 4, 1e-6)
    assert found[0, :8].isnan().all()
    assert torch.equal(found[0, 8:], alone[0, 8:])
    assert torch.equal(found[1], alone[1])


def test_it_runs_where_kernels_run_in_cpp_and_the_channels_fit(monkeypatch: pytest.MonkeyPatch):
    calls = []
    kernel = cpu_kernel.group_norm_silu
    monkeypatch.setattr(cpu_kernel, "group_norm_silu", lambda *args: calls.append(args[0].dtype) or kernel(*args))
    x, weight, bias = inputs(1, 16, 6, 6)
    for backend in ("auto", "cpu"):
        with using_backend(backend):
            group_norm_silu(x, weight, bias, 4, 1e-6)
    assert calls == [torch.float32, torch.float32]
    group_norm_silu(x.double(), weight.double(), bias.double(), 4, 1e-6)
    group_norm_silu(x, weight, bias, 4, 1e-6, offset=bias)
    group_norm_silu(x[:, :12], weight[:12], bias[:12], 4, 1e-6)
    with using_backend("reference"):
        found = group_norm_silu(x, weight, bias, 4, 1e-6)
    assert torch.equal(found, reference.group_norm_silu(x, weight, bias, 4, 1e-6, True, None))
    with torch.enable_grad():
        group_norm_silu(x.requires_grad_(), weight, bias, 4, 1e-6).sum().backward()
    assert x.grad is not None
    assert len(calls) == 2
