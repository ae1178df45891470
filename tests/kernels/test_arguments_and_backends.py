"""An argument that does not fit an operation is named; the backend that was asked for runs, or the call fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kernel_loops import selection_inputs
from torch import Tensor

import actvar_kernels
from actvar_kernels import (
    BackendUnavailableError,
    add_normalize,
    expert_ffn,
    expert_ffn_scatter,
    get_backend,
    normalize_modulate,
    route_experts,
    scatter_rows,
    select_tokens,
    set_backend,
    subset_attention,
)

pytestmark = pytest.mark.usefixtures("reference_backend")


def test_an_unknown_schedule_is_a_value_error() -> None:
    operation, arguments = OPERATIONS["expert_ffn_scatter"]
    with pytest.raises(ValueError, match=r"^schedule: expected one of auto, .*'fastest'"):
        operation(**arguments, schedule="fastest")
    with pytest.raises(ValueError, match=r"^schedule: .*'snap'; it was removed, use 'dense' or 'tile_list'"):
        operation(**arguments, schedule="snap")


R, L, K, C, N, D = 2, 9, 5, 64, 4, 256
OPERATIONS: dict[str, tuple[Callable, dict[str, object]]] = {
    "select_tokens": (
        select_tokens,
        dict(
            x=torch.ones(R, L, C),
            weight=torch.ones(1, C),
            bias=torch.ones(1),
            scale=torch.ones(R, 1, C),
            shift=torch.ones(R, 1, C),
            keep=K,
        ),
    ),
    "normalize_modulate": (
        normalize_modulate,
        dict(x=torch.ones(R, L, C), scale=torch.ones(R, 1, C), shift=torch.ones(R, 1, C)),
    ),
    "add_normalize": (
        add_normalize,
        dict(
            x=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            update=torch.ones(R, K, C),
            gamma=torch.ones(R, 1, C),
            scale=torch.ones(R, 1, C),
            shift=torch.ones(R, 1, C),
        ),
    ),
    "subset_attention": (
        subset_attention,
        dict(
            q=torch.ones(R, 2, K, 32),
            k=torch.ones(R, 2, L, 32),
            v=torch.ones(R, 2, L, 32),
            past=(torch.ones(R, 2, 3, 32), torch.ones(R, 2, 3, 32)),
            head_scale=torch.ones(2),
            softmax_scale=1.0,
            mask=torch.zeros(K, 3 + L),
        ),
    ),
    "route_experts": (
        route_experts,
        dict(u=torch.ones(R, K, C), weight=torch.ones(N, C), bias=torch.ones(N), active=3),
    ),
    "expert_ffn": (
        expert_ffn,
        dict(
            u=torch.ones(R, K, C),
            mask=torch.ones(R, K, N, dtype=torch.bool),
            active=3,
            fc1_weight=torch.ones(D, C),
            fc1_bias=torch.ones(D),
            fc2_weight=torch.ones(C, D),
            fc2_bias=torch.ones(C),
        ),
    ),
    "expert_ffn_scatter": (
        expert_ffn_scatter,
        dict(
            rest=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            rows=torch.ones(R, K, C),
            u=torch.ones(R, K, C),
            mask=torch.ones(R, K, N, dtype=torch.bool),
            active=3,
            fc1_weight=torch.ones(D, C),
            fc1_bias=torch.ones(D),
            fc2_weight=torch.ones(C, D),
            fc2_bias=torch.ones(C),
            gamma=torch.ones(R, 1, C),
        ),
    ),
    "scatter_rows": (
        scatter_rows,
        dict(
            rest=torch.ones(R, L, C),
            index=torch.arange(K).repeat(R, 1),
            rows=torch.ones(R, K, C),
            update=torch.ones(R, K, C),
            gamma=torch.ones(R, 1, C),
        ),
    ),
}
WRONG = [
    ("select_tokens", "x", torch.ones(L, C)),
    ("select_tokens", "weight", torch.ones(2, C)),
    ("select_tokens", "weight", torch.ones(C)),
    ("select_tokens", "bias", torch.ones(2)),
    ("select_tokens", "scale", torch.ones(R, C)),
    ("select_tokens", "shift", torch.ones(1, 1, C)),
    ("select_tokens", "keep", 0),
    ("select_tokens", "keep", L + 1),
    ("add_normalize", "x", torch.ones(L, C)),
    ("add_normalize", "index", torch.arange(K)),
    ("add_normalize", "update", torch.ones(R, L, C)),
    ("add_normalize", "gamma", torch.ones(R, C)),
    ("normalize_modulate", "x", torch.ones(L, C)),
    ("normalize_modulate", "scale", torch.ones(R, 1, C + 1)),
    ("normalize_modulate", "shift", torch.ones(R, 2, C)),
    ("subset_attention", "q", torch.ones(R, K, 64)),
    ("subset_attention", "k", torch.ones(R, 2, L, 16)),
    ("subset_attention", "v", torch.ones(R, 2, L + 1, 32)),
    ("subset_attention", "past keys", (torch.ones(R, 3, 3, 32), torch.ones(R, 3, 3, 32))),
    ("subset_attention", "past values", (torch.ones(R, 2, 3, 32), torch.ones(R, 2, 4, 32))),
    ("subset_attention", "head_scale", torch.ones(1, 2, 1, 1)),
    ("subset_attention", "mask", torch.zeros(K, L)),
    ("route_experts", "weight", torch.ones(N, C + 1)),
    ("route_experts", "bias", torch.ones(N + 1)),
    ("route_experts", "active", 0),
    ("route_experts", "active", N + 1),
    ("expert_ffn", "u", torch.ones(R, K, C + 1)),
    ("expert_ffn", "mask", torch.ones(R, K - 1, N, dtype=torch.bool)),
    ("expert_ffn", "mask", torch.ones(R * K, N, dtype=torch.bool)),
    ("expert_ffn", "mask", torch.ones(R, K, 3, dtype=torch.bool)),
    ("expert_ffn", "active", 0),
    ("expert_ffn", "active", N + 1),
    ("expert_ffn", "fc1_bias", torch.ones(1)),
    ("expert_ffn", "fc2_weight", torch.ones(D, C)),
    ("expert_ffn", "fc2_bias", torch.ones(1)),
    ("expert_ffn_scatter", "rest", torch.ones(R, L, C + 1)),
    ("expert_ffn_scatter", "index", torch.arange(K)),
    ("expert_ffn_scatter", "rows", torch.ones(R, L, C)),
    ("expert_ffn_scatter", "u", torch.ones(R, K, C + 1)),
    ("expert_ffn_scatter", "mask", torch.ones(R, K, 3, dtype=torch.bool)),
    ("expert_ffn_scatter", "active", N + 1),
    ("expert_ffn_scatter", "fc1_bias", torch.ones(1)),
    ("expert_ffn_scatter", "gamma", torch.ones(R, C)),
    ("scatter_rows", "rest", torch.ones(L, C)),
    ("scatter_rows", "index", torch.arange(K)),
    ("scatter_rows", "rows", torch.ones(R, L, C)),
    ("scatter_rows", "update", torch.ones(R, K, 1)),
    ("scatter_rows", "gamma", torch.ones(R, C)),
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_what_its_error_cases_are_made_from(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    operation(**arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    WRONG,
    ids=[f"{name} {argument} {list(v.shape) if isinstance(v, Tensor) else ''}" for name, argument, v in WRONG],
)
def test_an_argument_that_does_not_fit_is_named_in_a_value_error(name: str, argument: str, value: object) -> None:
    operation, arguments = OPERATIONS[name]
    with pytest.raises(ValueError, match=f"^{argument}: expected|^{argument}: the number of experts must divide"):
        operation(**{**arguments, argument.split()[0]: value})


def test_shared_guidance_needs_an_even_number_of_rows() -> None:
    x, weight, bias, scale, shift = selection_inputs(3, 9, 64)
    with pytest.raises(ValueError, match=r"^share_guidance: .* 3 rows"):
        select_tokens(x, weight, bias, scale, shift, 5, share_guidance=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backend_asked_for_by_name_raises_at_the_call_where_it_cannot_run(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    set_backend("triton")
    with pytest.raises(BackendUnavailableError, match=f"^{name}: the 'triton' backend needs"):
        operation(**arguments)


@pytest.mark.parametrize("name", ["expert_ffn", "expert_ffn_scatter"])
def test_experts_of_another_dtype_than_their_input_are_a_type_error_that_names_both(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    arguments = {**arguments, "u": arguments["u"].double()}
    with pytest.raises(TypeError, match=r"^u: expected the dtype of the weights, torch\.float32, .*got torch\.float64"):
        operation(**arguments)


def test_a_backend_asked_for_by_name_raises_also_where_gradients_are_wanted() -> None:
    _, arguments = OPERATIONS["expert_ffn"]
    arguments = {**arguments, "u": arguments["u"].clone().requires_grad_(True)}
    set_backend("triton")
    with pytest.raises(BackendUnavailableError, match=r"^expert_ffn: the 'triton' backend needs"):
        expert_ffn(**arguments)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_can_be_asked_for_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, arguments = OPERATIONS[name]
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    monkeypatch.setenv("ACTVAR_BACKEND", "reference")
    assert get_backend() == "reference"
    operation(**arguments)


def test_an_unknown_backend_is_a_value_error_that_changes_nothing() -> None:
    with pytest.raises(ValueError, match=r"set_backend: .*'cuda'"):
        set_backend("cuda")
    assert get_backend() == "reference"


def test_the_environment_chooses_the_backend_until_the_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    assert get_backend() == "auto"
    monkeypatch.setenv("ACTVAR_BACKEND", "triton")
    assert get_backend() == "triton"
    operation, arguments = OPERATIONS["scatter_rows"]
    with pytest.raises(BackendUnavailableError, match=r"^scatter_rows: the 'triton' backend needs"):
        operation(**arguments)
    set_backend("auto")
    assert get_backend() == "auto"
    operation(**arguments)


def test_an_unknown_backend_in_the_environment_is_a_value_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", None)
    monkeypatch.setenv("ACTVAR_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"ACTVAR_BACKEND: .*'fastest'"):
        get_backend()
    operation, arguments = OPERATIONS["route_experts"]
    with pytest.raises(ValueError, match="ACTVAR_BACKEND"):
        operation(**arguments)
