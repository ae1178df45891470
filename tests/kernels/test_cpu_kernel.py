"""The C++ kernel of the expert FFN against the reference, for every instruction set that this processor has."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import make_tiny_var, sample

from actvar import ActVARConfig, accelerate, apply_patch, load_pretrained, remove_patch
from actvar.config import DENSE
from actvar.families import family_of
from actvar.utils.wrappers import unwrapped
from actvar_kernels import BackendUnavailableError, expert_ffn, linear, linear_once, select_tokens
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu, packing
from actvar_kernels.expert_ffn import cpu_kernel, reference
from actvar_kernels.linear import cpu_kernel as linear_kernel

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"the C++ kernel: {cpu.why_unavailable()}")
ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
DTYPES = cpu.DTYPES


@pytest.fixture
def cpu_backend() -> Iterator[None]:
    with using_backend("cpu"):
        yield


def ffn(T: int, C: int, width: int, experts: int, dtype: torch.dtype, seed: int = 0) -> tuple:
    """u, mask and weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * std).to(dtype)

    D = width * experts
    weights = normal(D, C, std=C**-0.5), normal(D, std=0.1), normal(C, D, std=D**-0.5), normal(C)
    return normal(T, C), torch.rand(T, experts, generator=generator) < 0.7, *weights


def assert_as_exact(actual: torch.Tensor, arguments: tuple, factor: float = 4) -> None:
    """As near to the reference in float64 as `factor` times the reference in the arguments' own dtype, and as what any
    order of the sums in float32 may add."""
    u, mask, *weights = arguments
    exact = reference.expert_ffn(u.double(), mask, *(w.double() for w in weights))
    error = (reference.expert_ffn(u, mask, *weights).double() - exact).abs().max()
    assert actual.dtype == u.dtype
    allowed = factor * error + 2 * torch.finfo(u.dtype).eps + rounding(*arguments)
    assert ((actual.double() - exact).abs() <= allowed).all()


def rounding(u: torch.Tensor, mask: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """Error `[T, C]` that sums of n float32 products may have: a unit of rounding times sqrt(n) times the sum of their
    absolute values (Higham and Mary 2019); GELU's slope is at most 1.13."""
    fc1, bias1, fc2, bias2 = (weight.double().abs() for weight in weights)
    hidden = 1.13 * (u.double().abs() @ fc1.T + bias1)
    on = mask.repeat_interleave(len(fc1) // mask.shape[-1], dim=-1)
    unit = torch.finfo(torch.float32).eps / 2
    return unit * (u.shape[-1] + len(fc1)) ** 0.5 * (hidden * on @ fc2.T + bias2)


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "C", "width", "experts"),
    [(1, 64, 256, 16), (53, 192, 48, 16), (130, 128, 120, 4), (37, 66, 15, 3), (600, 32, 8, 40), (19, 2, 1, 1)],
)
def test_every_instruction_set_gives_the_reference(T, C, width, experts, dtype, isa):
    arguments = ffn(T, C, width, experts, dtype)
    assert_as_exact(cpu_kernel.expert_ffn(*arguments, isa=isa), arguments)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 70), st.integers(1, 80), st.integers(1, 20), st.sampled_from(DTYPES), st.data()
)
def test_any_shape(T, half_C, width, experts, dtype, data):
    arguments = ffn(T, 2 * half_C, width, experts, dtype)
    isa = data.draw(st.sampled_from(ISAS))
    assert_as_exact(cpu_kernel.expert_ffn(*arguments, isa=isa), arguments)


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
def test_large_and_small_hidden_units_saturate_as_gelu_does(isa):
    u = torch.tensor([[-200.0, 0], [-20, 0], [-5, 0], [-1e-3, 0], [0, 0], [1e-30, 0], [5, 0], [200, 0], [3e38, 0]])
    weights = torch.tensor([[1.0, 0]]), torch.zeros(1), torch.tensor([[1.0], [0]]), torch.zeros(2)
    mask = torch.ones(len(u), 1, dtype=torch.bool)
    actual = cpu_kernel.expert_ffn(u, mask, *weights, isa=isa)
    torch.testing.assert_close(actual, reference.expert_ffn(u, mask, *weights), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row_and_in_its_expert(dtype, isa):
    u, mask, w1, b1, w2, b2 = ffn(20, 64, 32, 4, dtype)
    mask[:, 1] = False
    clean = cpu_kernel.expert_ffn(u, mask, w1, b1, w2, b2, isa=isa)
    u[7, 3] = torch.nan
    mask[7, 0] = True
    w1[32:64], w2[:, 32:64] = torch.nan, torch.nan  # nobody wants expert 1
    found = cpu_kernel.expert_ffn(u, mask, w1, b1, w2, b2, isa=isa)
    assert found[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_the_other_tokens(dtype):
    u, mask, *weights = ffn(700, 96, 40, 8, dtype)
    together = cpu_kernel.expert_ffn(u, mask, *weights)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cpu_kernel.expert_ffn(u[order], mask[order], *weights), together[order])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu_kernel.expert_ffn(u, mask, *weights), together)
    finally:
        torch.set_num_threads(threads)


def test_a_token_without_experts_gets_the_bias_and_no_token_gives_none():
    u, mask, *weights = ffn(5, 64, 16, 4, torch.float32)
    mask[:] = False
    assert torch.equal(cpu_kernel.expert_ffn(u, mask, *weights), weights[3].expand(5, -1))
    assert cpu_kernel.expert_ffn(u[:0], mask[:0], *weights).shape == (0, 64)


def test_weights_are_packed_anew_when_they_change_and_freed_with_the_layer():
    gc.collect()
    before = len(packing._cache)
    u, mask, *weights = ffn(9, 64, 16, 4, torch.float32)
    first = cpu_kernel.expert_ffn(u, mask, *weights)
    assert torch.equal(cpu_kernel.expert_ffn(u, mask, *weights), first)
    assert len(packing._cache) == before + 1
    with torch.no_grad():
        weights[2].mul_(2)
    assert_as_exact(cpu_kernel.expert_ffn(u, mask, *weights), (u, mask, *weights))
    del weights
    gc.collect()
    assert len(packing._cache) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 33, 64)])
def test_a_packed_linear_layer_is_the_plain_one_to_rounding(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (24, shape[-1]), (24,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    plain = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    with torch.no_grad():
        before = len(packing._cache)
        results = [linear(x, weight, bias) for _ in range(2)]
        assert len(packing._cache) == before + 1
        weight.mul_(2)
        torch.testing.assert_close(linear(x, weight, bias) - bias, 2 * (results[0] - bias), atol=0.05, rtol=0.02)
    for result in results:
        assert result.dtype == dtype
        assert (result.double() - exact).abs().max() <= 4 * plain + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "C", "D"), [(1, 32, 1), (2, 64, 7), (3, 96, 6), (8, 1024, 33)])
def test_a_linear_layer_on_a_weight_as_it_is_is_the_plain_one_to_rounding(R, C, D, dtype, isa):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((R, C), (D, C), (D,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    plain = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    found = linear_kernel.unpacked_linear(x, weight, bias, isa=isa)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 4 * plain + torch.finfo(dtype).eps * exact.abs().max() / 4


@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize("kernel", [linear_kernel.linear, linear_kernel.unpacked_linear], ids=["packed", "as it is"])
def test_float16_ends_where_pytorchs_does(kernel, isa):
    """Sums that are too large become infinite, small ones subnormal, and NaN stays in its row and column."""
    x, weight, bias = torch.zeros(6, 32).half(), torch.zeros(5, 32).half(), torch.zeros(5).half()
    x[:, 0] = torch.tensor([6e4, -6e4, 6e-8, 3e-5, torch.nan, torch.inf])
    x[:, 1] = torch.tensor([6e4, -6e4, 6e-8, 6e-8, 1.0, 1.0])
    weight[:, 0], weight[:, 1] = (
        torch.tensor([1.0, 0.5, -1.0, 0.25, torch.nan]),
        torch.tensor([1.0, 0.5, -1.0, 0.25, 1.0]),
    )
    due = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).half()
    assert due.isinf().any()
    assert ((due != 0) & (due.abs() < torch.finfo(torch.float16).tiny)).any()
    torch.testing.assert_close(kernel(x, weight, bias, isa=isa), due, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_a_weight_stays_as_it_is_where_rows_are_few_and_fit(monkeypatch):
    calls = []
    kernel = linear_kernel.unpacked_linear
    monkeypatch.setattr(linear_kernel, "unpacked_linear", lambda *args: calls.append(args[0].shape) or kernel(*args))
    x, weight, bias = torch.randn(9, 64), torch.randn(5, 64), torch.randn(5)
    before = len(packing._cache)
    linear_once(x[:8], weight, bias)
    assert calls == [(8, 64)]
    assert len(packing._cache) == before
    for others in (
        (x, weight, bias),
        (x[:2, :33], weight[:, :33], bias),
        (x[:2].double(), weight.double(), bias.double()),
    ):
        assert torch.equal(linear_once(*others), torch.nn.functional.linear(*others))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_once(x[:2], weight, bias).dtype == torch.bfloat16
    assert len(calls) == 1


def test_weights_made_in_inference_mode_are_packed():
    with torch.inference_mode():
        arguments = ffn(9, 64, 16, 4, torch.float32)
        assert_as_exact(expert_ffn(*arguments[:2], 3, *arguments[2:]), arguments)


def test_the_operation_takes_it_by_default_and_leaves_gradients_and_other_types_to_the_reference(monkeypatch):
    calls = []
    original = cpu_kernel.expert_ffn
    monkeypatch.setattr(cpu_kernel, "expert_ffn", lambda *a: calls.append(a) or original(*a))
    u, mask, *weights = ffn(9, 64, 16, 4, torch.float32)
    expert_ffn(u, mask, 3, *weights)
    assert len(calls) == 1
    expert_ffn(u, mask.float(), 3, *weights)
    expert_ffn(u.double(), mask, 3, *(w.double() for w in weights))
    expert_ffn(u.requires_grad_(), mask, 3, *weights).sum().backward()
    assert u.grad.isfinite().all()
    assert len(calls) == 1


def test_under_autocast_it_computes_in_the_lower_type_with_weights_packed_once():
    u, mask, *weights = ffn(9, 64, 16, 4, torch.float32)
    before = len(packing._cache)
    with torch.autocast("cpu", torch.bfloat16):
        found = [expert_ffn(u, mask, 3, *weights) for _ in range(3)]
    assert len(packing._cache) == before + 1
    assert_as_exact(found[2], (u.bfloat16(), mask, *(w.bfloat16() for w in weights)))


def test_asked_for_by_name_it_runs_or_raises(cpu_backend, monkeypatch):
    u, mask, *weights = ffn(9, 64, 16, 4, torch.float32)
    assert_as_exact(expert_ffn(u, mask, 3, *weights), (u, mask, *weights))
    leaf = u.clone().requires_grad_()
    expert_ffn(leaf, mask, 3, *weights).sum().backward()
    expected = u.clone().requires_grad_()
    reference.expert_ffn(expected, mask, *weights).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
    with pytest.raises(BackendUnavailableError, match=r"takes float32, bfloat16 and float16, .* got torch.float64"):
        expert_ffn(u.double(), mask, 3, *(w.double() for w in weights))
    with pytest.raises(BackendUnavailableError, match=r"got .* mask in torch.float32"):
        expert_ffn(u, mask.float(), 3, *weights)
    x = u.view(1, 9, 64)
    select_tokens(x, torch.ones(1, 64), torch.zeros(1), torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), 3)
    with pytest.raises(BackendUnavailableError, match="needs CPU tensors, got meta"):
        expert_ffn(u.to("meta"), mask.to("meta"), 3, *(w.to("meta") for w in weights))
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler here")
    with pytest.raises(BackendUnavailableError, match="no compiler here"):
        expert_ffn(u, mask, 3, *weights)


def test_without_a_compiler_the_default_is_the_reference_and_says_so_once(monkeypatch, caplog):
    u, mask, *weights = ffn(9, 64, 16, 4, torch.float32)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler here")
    cpu.available.cache_clear()
    try:
        for _ in range(2):
            assert torch.equal(expert_ffn(u, mask, 3, *weights), reference.expert_ffn(u, mask, *weights))
        assert [record.getMessage() for record in caplog.records if "no compiler here" in record.getMessage()]
        assert len(caplog.records) == 1
    finally:
        cpu.available.cache_clear()


def test_the_bundled_model_draws_the_reference_tokens():
    images = {}
    for backend in ("reference", "cpu"):
        with using_backend(backend):
            _, var = load_pretrained("fashion-mnist", adapter="paper")
            images[backend] = var.autoregressive_infer_cfg(10, torch.arange(10), g_seed=0)
    torch.testing.assert_close(images["cpu"], images["reference"], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bundled_model_errs_no_more_in_cpp_than_by_pytorch(dtype):
    labels, generator = torch.tensor([3, 7]), torch.Generator().manual_seed(0)

    def logits(dtype: torch.dtype, backend: str) -> torch.Tensor:
        _, var = load_pretrained("fashion-mnist")
        accelerate(var.to(dtype))
        family = family_of(var)
        found = family.scale_logits(unwrapped(var), labels, family.teacher_input(var, labels, maps))
        with using_backend(backend):
            return torch.cat([logits for _, logits in found], dim=1).double()

    _, var = load_pretrained("fashion-mnist")
    maps = torch.randint(var.V, (2, sum(side * side for side in var.patch_nums)), generator=generator)
    exact = logits(torch.float64, "reference")
    in_cpp, by_pytorch = ((logits(dtype, backend) - exact).norm() for backend in ("cpu", "reference"))
    assert 0 < in_cpp <= 1.1 * by_pytorch


@pytest.mark.parametrize("forced", [False, True])
def test_rates_of_1_and_acceleration_draw_the_tokens_of_the_dense_model(forced):
    _, var = load_pretrained("fashion-mnist")
    dense = var.autoregressive_infer_cfg(10, torch.arange(10), g_seed=0)
    for patch in (accelerate, lambda var: apply_patch(var, replace(DENSE, always_sparse=forced))):
        patch(var)
        torch.testing.assert_close(
            var.autoregressive_infer_cfg(10, torch.arange(10), g_seed=0), dense, atol=1e-4, rtol=0
        )
        remove_patch(var)
    assert torch.equal(var.autoregressive_infer_cfg(10, torch.arange(10), g_seed=0), dense)


def test_a_copied_and_a_saved_model_carry_no_packed_weights(tmp_path):
    var = apply_patch(make_tiny_var(), ActVARConfig(num_experts=8))
    sample(var)
    twin = copy.deepcopy(var)
    assert torch.equal(sample(twin), sample(var))
    torch.save(var, tmp_path / "var.pt")
    weights = sum(p.numel() * p.element_size() for p in var.parameters())
    vae = sum(p.numel() * p.element_size() for p in var.vae_proxy[0].parameters())
    assert (tmp_path / "var.pt").stat().st_size < 1.2 * (weights + vae) + 2**20
