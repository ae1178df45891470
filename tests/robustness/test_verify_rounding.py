"""The tolerances of `verify`: above what rounding does in any order of the sums, below faults of real size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import make_tiny_var
from torch.nn import functional as F

import actvar.families.named_layers
from actvar import ActVARConfig, load_pretrained
from actvar.sampling.request import Sampling
from actvar.verify.rounding import FACTOR, MOVES, UNIT, measured, moved, unmoved
from actvar.verify.run import verify
from actvar_kernels.cpu_backend import cpu

CPP = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"the C++ kernels: {cpu.why_unavailable()}")
ISAS = range(cpu.best_isa() + 1) if cpu.why_unavailable() is None else ()
# What each product is multiplied by, `[n]`, so that partial sums are large where the whole sum is not.
SHAPES = {
    "random": lambda n: torch.ones(n),
    "halves of opposite signs": lambda n: torch.where(torch.arange(n) < n // 2, 1.0, -1.0),
    "runs of 16": lambda n: torch.arange(n).div(16, rounding_mode="floor").mul(2.4).sin().sign(),
    "growing": lambda n: torch.arange(n) / n,
    "shrinking": lambda n: 0.99 ** torch.arange(n),
}


def one_after_the_other(products: np.ndarray) -> np.ndarray:
    return np.cumsum(products, axis=-1, dtype=np.float32)[..., -1]


def in_lanes(products: np.ndarray, lanes: int = 8) -> np.ndarray:
    padded = np.pad(products, [*[(0, 0)] * (products.ndim - 1), (0, -products.shape[-1] % lanes)])
    lanes = one_after_the_other(padded.reshape(*products.shape[:-1], -1, lanes).swapaxes(-1, -2))
    return one_after_the_other(lanes)


SUMS = {
    "one after the other": one_after_the_other,
    "from the end": lambda products: one_after_the_other(products[..., ::-1]),
    "in lanes": in_lanes,
    "in random order": lambda products: one_after_the_other(
        products[..., np.random.default_rng(0).permutation(products.shape[-1])]
    ),
}


def factors(length: int, mean: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` `[8, length]` and `weight` `[8, length]` in float32, of numbers around `mean`."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 8, length, generator=generator) + mean)


def limits(value: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Error and tolerance of `value` as `x @ weight.T`, beside a reference whose sums are rounded only once."""
    due = F.linear(x.double(), weight.double())
    reference = due.float()
    return measured(value, due, reference, due, lambda: F.linear(unmoved(x), moved(weight)))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5000),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(sorted(SUMS)),
    st.integers(0, 99),
)
def test_sums_stay_within_the_tolerance_in_every_order(length, mean, shape, order, seed):
    x, weight = factors(length, mean, seed)
    x = x * SHAPES[shape](length)
    products = (x[:, None] * weight).numpy()
    error, tolerance = limits(torch.from_numpy(SUMS[order](products)), x, weight)
    assert error <= tolerance


@pytest.mark.parametrize("length", [64, 192, 768, 1024, 4096, 7680])
@pytest.mark.parametrize("bits", [8, 11], ids=["bfloat16", "TensorFloat-32"])
def test_products_of_shorter_numbers_are_beyond_the_tolerance(length, bits):
    def shortened(tensor: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp((mantissa * 2**bits).round(), exponent - bits)

    x, weight = factors(length, 0.0, 0)
    error, tolerance = limits(F.linear(shortened(x), shortened(weight)), x, weight)
    assert error > 4 * tolerance


def test_a_move_is_a_sign_for_each_run_and_the_same_in_every_call():
    weight = factors(8, 1.0, 0)[1]
    change = (moved(weight) / weight.double() - 1) / (math.sqrt(8) * UNIT)
    assert set(change.round(decimals=3).unique().tolist()) == {-4.0, -2.0, 0.0, 2.0, 4.0}
    pairs = change.unflatten(-1, (2, 2, 2))
    assert (pairs.mean(dim=-1) - pairs.mean(dim=(-1, -2))[..., None]).abs().max() > 0.5
    assert torch.equal(moved(weight), moved(weight))
    assert torch.allclose((moved(weight, 2) - weight) * 2, moved(weight) - weight, rtol=1e-6, atol=0)


def test_the_floor_is_asked_for_where_it_decides_alone():
    def fail() -> torch.Tensor:
        raise AssertionError("the floor was asked for")

    due = torch.ones(3, dtype=torch.float64)
    within = due.float() * (1 + 2**-23)
    assert measured(within, due, within, due, fail) == (2**-23, FACTOR * 2**-23)
    assert measured(due.float()[:2], due, due.float(), due, fail)[0] == math.inf
    assert math.isnan(measured(due.float() * math.nan, due, due.float(), due, fail)[0])
    assert measured(within, due, due.float(), due, lambda: due + 1) == (2**-23, FACTOR * UNIT)
    assert measured(due.float() + 2, due, due.float(), due, lambda: due + 1) == (2.0, MOVES)


# --- whole models


def rounded_once(function: Callable) -> Callable:
    """A float32 function that computes in float64 and rounds its result: PyTorch on the best of all processors."""

    def call(*args, **kwargs):
        if not any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 for arg in args):
            return function(*args, **kwargs)
        widened = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*widened, **kwargs).float()

    return call


@pytest.fixture
def best_processor(monkeypatch) -> None:
    for name in ("linear", "layer_norm", "normalize", "scaled_dot_product_attention", "gelu"):
        monkeypatch.setattr(F, name, rounded_once(getattr(F, name)))


def tiny(dtype: torch.dtype) -> torch.nn.Module:
    return make_tiny_var().requires_grad_(False).to(dtype)


def bundled(dtype: torch.dtype) -> torch.nn.Module:
    return load_pretrained("fashion-mnist-small")[1].requires_grad_(False).to(dtype)


def failures(load: Callable, backend: str, labels: tuple[int, ...] = (1,), **config) -> list:
    report = verify(load, ActVARConfig(num_experts=8, **config), None, Sampling(labels), backends=[backend])
    assert len(report.checks) > 100
    return report.failures


@CPP
@pytest.mark.parametrize("isa", ISAS, ids=cpu.isa_name)
@pytest.mark.parametrize(("load", "labels"), [(tiny, (1, 2)), (bundled, (1,))])
def test_every_instruction_set_passes_beside_the_best_reference(load, labels, isa, best_processor, monkeypatch):
    monkeypatch.setattr(cpu, "best_isa", lambda: isa)
    assert failures(load, "cpu", labels) == []


@CPP
@pytest.mark.parametrize("changes", [{"kv": "all", "share_cfg_selection": True}, {"ffn_rate": 1}], ids=str)
def test_every_configuration_passes_beside_the_best_reference(changes, best_processor):
    assert failures(tiny, "cpu", **changes) == []


def of_bfloat16(x, weight, bias):
    return F.linear(x.bfloat16().float(), weight.bfloat16().float(), bias)


def without_bias(x, weight, bias):
    return F.linear(x, weight)


def with_a_row_twice(x, weight, bias):
    result = F.linear(x, weight, bias)
    result[..., 1, :] = result[..., 0, :]
    return result


def with_two_units_exchanged(x, weight, bias):
    result = F.linear(x, weight, bias)
    return torch.cat((result[..., 1:2], result[..., :1], result[..., 2:]), dim=-1)


@pytest.mark.parametrize("load", [tiny, bundled])
@pytest.mark.parametrize("fault", [of_bfloat16, without_bias, with_a_row_twice, with_two_units_exchanged])
def test_a_fault_of_a_linear_layer_is_found_in_every_block(fault, load, monkeypatch):
    def only_float32(x, weight, bias, _quantized):
        return fault(x, weight, bias) if x.dtype == torch.float32 and x.shape[-2] > 1 else F.linear(x, weight, bias)

    monkeypatch.setattr(actvar.families.named_layers, "linear", only_float32)
    found = failures(load, "reference")
    assert {check.check for check in found} <= {"rates 1, forced", "rates 1, forced, tokens"}
    places = {(check.block, check.what) for check in found if check.what == "output"}
    assert places == {(block, "output") for block in range(len(load(torch.float32).blocks))}
