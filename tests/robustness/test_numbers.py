"""Numbers of every kind are numbers, wherever one goes: they give what Python's own give, and bools are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import make_tiny_var

import actvar_kernels
from actvar import ActVARConfig, accelerate, remove_patch
from actvar.baselines import skip_last_scales, token_merging, without_guidance
from actvar.calibrate import calibrate
from actvar.config import share_of
from actvar.distill import data
from actvar.distill.run import Distillation
from actvar.evaluate.run import Evaluation
from actvar.flops import counted_flops, model_flops
from actvar.models import build_vae_var
from actvar.patching.adapter import save_adapter
from actvar.patching.patch import patch_silently
from actvar.sampling.request import Sampling
from actvar.sampling.shards import Bulk
from actvar.training.plan import Plan
from actvar_kernels.backend import using_backend
from actvar_kernels.checks import as_integer, as_number

INTEGERS = {
    "numpy int64": np.int64,
    "numpy uint8": np.uint8,
    "numpy array": np.array,
    "tensor": torch.tensor,
}
REALS = {
    "numpy float64": np.float64,
    "numpy float32": np.float32,
    "numpy float16": np.float16,
    "numpy array": np.array,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "fraction": Fraction,
}
NOT_NUMBERS = [
    True,
    np.True_,
    torch.tensor(True),
    "1",
    b"1",
    None,
    1j,
    np.complex64(1),
    [1],
    np.array([1]),
    torch.ones(1),
]


def converted(values: dict, integer, real) -> dict:
    """Return `values` with numbers of other kinds, also within tuples."""

    def convert(value):
        if isinstance(value, tuple):
            return tuple(convert(item) for item in value)
        if isinstance(value, bool | str) or value is None:
            return value
        return integer(value) if isinstance(value, int) else real(value)

    return {name: convert(value) for name, value in values.items()}


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_integer_of_any_kind_is_that_integer(value):
    for kind in (int, np.int64, np.array, torch.tensor):
        found = as_integer("n", kind(value))
        assert (type(found), found) == (int, value)


@given(st.floats(allow_nan=False, width=32))
def test_a_number_of_any_kind_is_that_number(value):
    for kind in (float, np.float32, np.float64, np.longdouble, np.array, torch.tensor):
        found = as_number("x", kind(value))
        assert (type(found), found) == (float, value)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name(value):
    for convert in (as_integer, as_number):
        with pytest.raises(TypeError, match=r"^width: expected an? (integer|number), got "):
            convert("width", value)


@pytest.mark.parametrize("value", [1.0, np.float64(1), torch.tensor(1.0), np.float32(1.5), Fraction(1, 2)], ids=repr)
def test_a_number_with_a_fraction_is_no_integer(value):
    with pytest.raises(TypeError, match="count: expected an integer"):
        as_integer("count", value)


def test_a_number_beyond_all_floats_is_refused():
    with pytest.raises(ValueError, match="cfg: expected a number, got one that is too large"):
        as_number("cfg", 10**400)


# Operations

R, L, C, N, V = 2, 4, 32, 4, 16


def rows(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).sin().view(shape)


def gates() -> tuple[torch.Tensor, ...]:
    return rows(R, 1, C), rows(R, 1, C)


def experts() -> tuple[torch.Tensor, ...]:
    mask = torch.zeros(R, L, N, dtype=torch.bool)
    mask[..., :2] = True
    return rows(R, L, C), mask


def ffn_weights() -> tuple[torch.Tensor, ...]:
    return rows(2 * C, C), rows(2 * C), rows(C, 2 * C), rows(C)


OPERATIONS = {
    "select_tokens keep": (
        lambda n: actvar_kernels.select_tokens(rows(R, L, C), rows(1, C), rows(1), *gates(), n)[1],
        2,
    ),
    "route_experts active": (lambda n: actvar_kernels.route_experts(rows(R, L, C), rows(N, C), rows(N), n)[0], 2),
    "expert_ffn active": (lambda n: actvar_kernels.expert_ffn(*experts(), n, *ffn_weights()), 2),
    "expert_ffn_scatter active": (
        lambda n: actvar_kernels.expert_ffn_scatter(
            None, None, rows(R, L, C), *experts(), n, *ffn_weights(), rows(R, 1, C)
        ),
        2,
    ),
    "add_normalize_route active": (
        lambda n: (
            actvar_kernels.add_normalize_route(
                rows(R, L, C), None, rows(R, L, C), rows(R, 1, C), *gates(), rows(N, C), rows(N), n
            ).mask
        ),
        2,
    ),
    "sample_tokens top_k": (lambda n: actvar_kernels.sample_tokens(rows(2, L, V), 1.5, n, 0.5, seed=3), 5),
    "sample_tokens seed": (lambda n: actvar_kernels.sample_tokens(rows(2, L, V), 1.5, 0, 0.0, seed=n), 5),
    "sample_tokens step": (lambda n: actvar_kernels.sample_tokens(rows(2, L, V), 1.5, 0, 0.0, seed=3, step=n), 5),
    "group_norm_silu groups": (
        lambda n: actvar_kernels.group_norm_silu(rows(1, C, 2, 2), rows(C), rows(C), n, 1e-6),
        4,
    ),
    "normalize_modulate guidance": (lambda x: actvar_kernels.normalize_modulate(rows(R, L, C), *gates(), x), 0.5),
    "sample_tokens guidance": (lambda x: actvar_kernels.sample_tokens(rows(2, L, V), x, 0, 0.0, seed=3), 0.5),
    "sample_tokens top_p": (lambda x: actvar_kernels.sample_tokens(rows(2, L, V), 1.5, 0, x, seed=3), 0.5),
    "group_norm_silu eps": (lambda x: actvar_kernels.group_norm_silu(rows(1, C, 2, 2), rows(C), rows(C), 4, x), 0.5),
    "subset_attention softmax_scale": (
        lambda x: actvar_kernels.subset_attention(*[rows(1, 2, 3, 16)] * 3, None, None, x)[0],
        0.5,
    ),
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_numbers_of_any_kind(name, backend):
    run, value = OPERATIONS[name]
    kinds = INTEGERS if isinstance(value, int) else REALS
    with using_backend(backend):
        expected = run(value)
        for kind in kinds.values():
            if name == "sample_tokens seed" and kind is torch.tensor:
                continue  # a tensor is read on the device, and must be int64
            assert torch.equal(run(kind(value)), expected)
        with pytest.raises(TypeError, match=f"{name.split()[1]}: expected an? (integer|number), got True"):
            run(True)


# Sampling

SAMPLING = dict(B=2, label_B=3, g_seed=7, cfg=1.5, top_k=20, top_p=0.75)


@pytest.fixture(scope="module")
def var():
    return make_tiny_var()


@pytest.mark.parametrize("change", [remove_patch, accelerate], ids=["dense", "accelerated"])
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_takes_numbers_of_any_kind(var, name, change):
    change(var)
    expected = var.autoregressive_infer_cfg(**SAMPLING)
    kinds = dict(INTEGERS) if isinstance(SAMPLING[name], int) else dict(REALS)
    if name == "label_B":
        del kinds["tensor"]  # which is one of labels [B]
    for kind in kinds.values():
        assert torch.equal(var.autoregressive_infer_cfg(**SAMPLING | {name: kind(SAMPLING[name])}), expected)
    with pytest.raises(TypeError, match=name):
        var.autoregressive_infer_cfg(**SAMPLING | {name: np.True_})


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_seeds_of_images_come_in_any_kind_of_sequence(var, kind):
    remove_patch(var)
    expected = var.autoregressive_infer_cfg(2, 3, g_seed=(4, 5))
    assert torch.equal(var.autoregressive_infer_cfg(2, 3, g_seed=kind([4, 5])), expected)


# Settings

SETTINGS = {
    "config": (
        ActVARConfig,
        dict(scales=(-2, -1), token_rates=(0.5, (0.25, 0.75)), ffn_rate=0.5, num_experts=8, fixed_tokens=False),
    ),
    "sampling": (Sampling, dict(labels=(1, 2), cfg=1.5, top_k=3, top_p=0.5, seed=(4, 5))),
    "bulk": (lambda **numbers: Bulk(Sampling((1, 2)), **numbers), dict(num=10, batch=4)),
    "evaluation": (
        Evaluation,
        dict(num=20, seed=1, repeats=2, batch=5, cfg=1.5, top_k=3, top_p=0.5, rounds=1),
    ),
    "distillation": (
        Distillation,
        dict(stage=2, epochs=1.5, batch=8, lr=0.5, accumulate=2, ema=0.5, clip=1.5, seed=3, cfg=1.5),
    ),
    "plan": (
        lambda **numbers: Plan("name", Path("folder"), **numbers),
        dict(steps=3, batch=8, lr=0.5, warmup=2, weight_decay=0.5, clip=1.5, accumulate=2, ema=0.5, seed=3),
    ),
}


KINDS = {
    "numpy": (np.int64, np.float64),
    "short numpy": (lambda n: np.int8(n), np.float32),
    "arrays": (np.array, np.array),
    "tensors": (torch.tensor, torch.tensor),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_take_numbers_of_any_kind_and_keep_pythons_own(name, kinds):
    make, values = SETTINGS[name]
    made, expected = make(**converted(values, *kinds)), make(**values)
    assert made == expected
    assert json.dumps(asdict(made), default=str) == json.dumps(asdict(expected), default=str)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_refuse_a_bool_for_every_number_by_its_name(name):
    make, values = SETTINGS[name]
    for field, value in values.items():
        if not isinstance(value, bool):
            wrong = (np.True_,) * len(value) if isinstance(value, tuple) else np.True_
            with pytest.raises(TypeError, match=f"{'g_seed' if (name, field) == ('sampling', 'seed') else field}: "):
                make(**values | {field: wrong})


def test_a_configuration_takes_arrays_and_tensors():
    expected = ActVARConfig((-2, -1), ((0.25, 0.5), (0.5, 1.0)), (0.5, 0.75))
    for array in (np.array, torch.tensor, list):
        rates = array([[0.25, 0.5], [0.5, 1.0]])
        config = ActVARConfig(array([-2, -1]), rates, array([0.5, 0.75]), fixed_tokens=np.False_)
        assert config == expected
        assert ActVARConfig.from_json(config.to_json()) == expected
    assert replace(expected, always_sparse=np.True_).always_sparse is True


def test_a_model_of_numpy_sizes_is_one_of_pythons(tmp_path):
    sizes = dict(V=32, Cvae=8, ch=32, num_classes=3, depth=2, width=64, num_res_blocks=1, image_channels=1, seed=3)
    sides = dict(patch_nums=(1, 2, 3), ch_mult=(1, 1))
    of_numpy = build_vae_var(**converted(sizes | sides, np.int64, float))[1]
    of_python = build_vae_var(**sizes, **sides)[1]
    assert all(torch.equal(a, b) for a, b in zip(of_numpy.parameters(), of_python.parameters(), strict=True))
    patch_silently(of_numpy, ActVARConfig(num_experts=8))
    save_adapter(of_numpy, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size > 0


@pytest.mark.parametrize("integer", [np.int32, torch.tensor])
def test_functions_that_sample_take_numbers_of_any_kind(var, integer):
    remove_patch(var)
    expected = data.sampled_source(var, 6, 2)
    found = data.sampled_source(var, integer(6), integer(2))
    assert found.facts == expected.facts
    assert json.dumps(found.facts) == json.dumps(expected.facts)
    assert torch.equal(found.tokens_of(0, 6), expected.tokens_of(0, 6))
    reports = [
        calibrate(var, ActVARConfig(num_experts=8), images=kind(4), seed=kind(1), cfg=real(1.5), uniform=True)
        for kind, real in ((int, float), (integer, np.float32))
    ]
    assert reports[0].as_dict() == reports[1].as_dict()


@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.tensor])
def test_flops_of_a_batch_of_any_kind_do_not_overflow(var, kind):
    remove_patch(var)
    for count in (model_flops, counted_flops):
        assert count(var, kind(200)) == count(var, 200)
        with pytest.raises(TypeError, match="batch: expected an integer of at least 1, got True"):
            count(var, True)


@pytest.mark.parametrize(
    ("method", "value"),
    [(skip_last_scales, np.int8(1)), (without_guidance, np.array(2)), (token_merging, np.float16(0.75))],
)
def test_other_methods_take_numbers_of_any_kind(var, method, value):
    remove_patch(var)
    images = []
    for number in (value.item(), value):
        with method(var, number):
            images.append(var.autoregressive_infer_cfg(**SAMPLING))
    assert torch.equal(*images)


def test_shares_are_computed_in_full_precision():
    assert share_of(np.float16(0.75), 4097) == share_of(0.75, 4097) == 3073


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(1, seed=2**40), "seed: expected an integer from"),
        (lambda: Distillation(1, batch=0), "batch: expected an integer of at least 1"),
        (lambda: Distillation(1, accumulate=0), "accumulate: expected an integer of at least 1"),
        (lambda: Distillation(1, lr=float("inf")), "lr: expected a finite number"),
        (lambda: Distillation(3), "stage: expected an integer from 1 to 2"),
        (lambda: Plan("name", Path("folder"), 3, 8, 0.5, accumulate=0), "accumulate: expected"),
        (lambda: Plan("name", Path("folder"), 3, 8, float("nan")), "lr: expected a finite number"),
        (lambda: Evaluation(rounds=-1), "rounds: expected"),
        (lambda: Evaluation(seed=2**64 - 1, repeats=2), "seed: expected"),
        (lambda: Bulk(Sampling((0,)), 2**63), "num: expected an integer from 1"),
    ],
)
def test_limits_are_checked_before_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()
