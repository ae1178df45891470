"""A backend that is asked for by name runs an operation or raises; no call runs another one in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.helpers import make_tiny_var, sample

from actvar import accelerate, apply_patch
from actvar_kernels import (
    BackendUnavailableError,
    add_normalize,
    add_normalize_route,
    add_residual,
    add_residual_moments,
    backend,
    conv3x3,
    expert_ffn,
    expert_ffn_scatter,
    group_norm_silu,
    linear,
    linear_once,
    normalize_modulate,
    route_experts,
    sample_tokens,
    scatter_rows,
    select_tokens,
    subset_attention,
)
from actvar_kernels.backend import using_backend
from actvar_kernels.conv3x3 import onednn
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.token_draw import cpu_kernel as sampling_kernel

R, L, K, C, N, D, H = 2, 9, 5, 64, 4, 256, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_cpp = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


X, ROWS, UPDATE, U = normal(R, L, C), normal(R, K, C), normal(R, K, C), normal(R, K, C)
VECTOR, BIAS = normal(R, 1, C) * 0.3, normal(C)
INDEX = torch.tensor([[0, 2, 3, 5, 8], [1, 2, 4, 6, 7]])
MASK = torch.tensor([True, False, True, True]).expand(R, K, N)
FFN = (normal(D, C) * 0.1, normal(D), normal(C, D) * 0.1, normal(C))
ROUTER = (normal(N, C), normal(N))
HEADS = normal(R, H, K, 32), normal(R, H, L, 32), normal(R, H, L, 32)
MAPS, KERNEL = normal(R, 32, 6, 6), normal(16, 32, 3, 3)

Call = Callable[[Callable], torch.Tensor]
"""A call of an operation; its argument converts floating-point tensors to a dtype."""

IN_CPP: dict[str, Call] = {
    "select_tokens": lambda to: select_tokens(to(X), to(normal_like(1, C)), to(BIAS[:1]), to(VECTOR), to(VECTOR), K)[1],
    "normalize_modulate": lambda to: normalize_modulate(to(X), to(VECTOR), to(VECTOR)),
    "add_normalize": lambda to: add_normalize(to(X), INDEX, to(UPDATE), to(VECTOR), to(VECTOR), to(VECTOR))[1],
    "add_normalize_route": lambda to: (
        add_normalize_route(to(X), INDEX, to(UPDATE), to(VECTOR), to(VECTOR), to(VECTOR), *map(to, ROUTER), 3).logits
    ),
    "route_experts": lambda to: route_experts(to(U), *map(to, ROUTER), 3)[1],
    "subset_attention": lambda to: subset_attention(*map(to, HEADS), None, None, 0.2, keep_cache=False)[0],
    "expert_ffn": lambda to: expert_ffn(to(U), MASK, 3, *map(to, FFN)),
    "expert_ffn_scatter": lambda to: expert_ffn_scatter(
        to(X).clone(), INDEX, to(ROWS), to(U), MASK, 3, *map(to, FFN), to(VECTOR)
    ),
    "scatter_rows": lambda to: scatter_rows(to(X).clone(), INDEX, to(ROWS), to(UPDATE), to(VECTOR)),
    "scatter_rows of all": lambda to: scatter_rows(None, None, to(ROWS), to(UPDATE), to(VECTOR)),
    "sample_tokens": lambda to: sample_tokens(to(X), None, 3, 0.9, seed=1).float(),
    "linear": lambda to: linear(to(U), to(FFN[0]), to(FFN[1])),
    "linear_once": lambda to: linear_once(to(U[:, 0]), to(FFN[0]), to(FFN[1])),
    "conv3x3": lambda to: conv3x3(to(MAPS), to(KERNEL), to(BIAS[:16])),
    "group_norm_silu": lambda to: group_norm_silu(to(MAPS), to(BIAS[:32]), to(BIAS[32:]), 8, 1e-6),
}
NOT_IN_CPP: dict[str, Call] = {
    "normalize_modulate, guided": lambda to: normalize_modulate(to(X), to(VECTOR), to(VECTOR), 1.5),
    "subset_attention, masked": lambda to: subset_attention(
        *map(to, HEADS), None, None, 0.2, mask=torch.zeros(K, L), keep_cache=False
    )[0],
    "expert_ffn, gates": lambda to: expert_ffn(to(U), MASK.float(), 3, *map(to, FFN)),
    "conv3x3, channels": lambda to: conv3x3(to(MAPS[:, :3]), to(KERNEL[:, :3]), to(BIAS[:16])),
    "conv3x3, no bias": lambda to: conv3x3(to(MAPS), to(KERNEL), None),
    "group_norm_silu, offset": lambda to: group_norm_silu(
        to(MAPS), to(BIAS[:32]), to(BIAS[32:]), 8, 1e-6, offset=to(BIAS[:32])
    ),
    "add_residual": lambda to: add_residual(to(MAPS), to(MAPS), to(BIAS[:32])),
    "add_residual_moments": lambda to: add_residual_moments(to(MAPS), to(MAPS), to(BIAS[:32]))[1],
}
OF_LIBRARIES = {"linear", "linear_once", "conv3x3", "scatter_rows of all"}
"""On the Triton backend these are products and sums of cuBLAS, cuDNN and PyTorch, as their documentation says."""
ANY_DTYPE = {"sample_tokens"}


def normal_like(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, shape[0] * shape[1]).view(shape)


@contextmanager
def calls_of_cpp() -> Iterator[list[str]]:
    """Names of the C++ functions that are called in the context."""
    names: list[str] = []
    libraries = [cpu.library(), sampling_kernel.library()]
    functions = [
        (library, name, function)
        for library in libraries
        for name, function in vars(library).items()
        if callable(function) and not name.startswith("_") and name not in ("checksums", "best_isa", "isa_layout")
    ]
    before = [function.errcheck if hasattr(function, "errcheck") else None for *_, function in functions]

    def note(name: str) -> Callable:
        return lambda result, *_: names.append(name) or result

    for _, name, function in functions:
        function.errcheck = note(name)
    try:
        yield names
    finally:
        for (*_, function), check in zip(functions, before, strict=True):
            function.errcheck = check if check is not None else (lambda result, *_: result)


def to_dtype(dtype: torch.dtype) -> Callable:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IN_CPP)
def test_cpp_runs_or_raises(name: str, dtype: torch.dtype) -> None:
    call, to = IN_CPP[name], to_dtype(dtype)
    with using_backend("cpu"), torch.no_grad():
        call(to_dtype(torch.float32))  # loads the libraries, and sets the types of their functions
        if dtype not in cpu.DTYPES and name not in ANY_DTYPE:
            with calls_of_cpp() as names, pytest.raises(BackendUnavailableError, match=name.split()[0]):
                call(to)
            assert names == []
            return
        call(to)  # may take other functions than float32 does
        with calls_of_cpp() as names:
            found = call(to)
    assert names or (name == "conv3x3" and onednn.faster(dtype))
    with using_backend("reference"), torch.no_grad():
        due = call(to_dtype(torch.float64) if name not in ANY_DTYPE else to)
    error, largest = (found.double() - due.double()).abs().max(), due.double().abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * largest


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NOT_IN_CPP)
def test_calls_without_a_cpp_kernel_raise(name: str, dtype: torch.dtype) -> None:
    with using_backend("cpu"), torch.no_grad(), pytest.raises(BackendUnavailableError, match=name.split(",")[0]):
        NOT_IN_CPP[name](to_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*IN_CPP, *NOT_IN_CPP])
def test_the_reference_runs_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    call = {**IN_CPP, **NOT_IN_CPP}[name]
    with using_backend("reference"), torch.no_grad():
        if cpu.why_unavailable() is None:
            with calls_of_cpp() as names:
                found = call(to_dtype(dtype))
            assert names == []
        else:
            found = call(to_dtype(dtype))
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*IN_CPP, *NOT_IN_CPP])
def test_triton_raises_on_the_cpu_without_its_interpreter(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**IN_CPP, **NOT_IN_CPP}[name]
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with using_backend("triton"), torch.no_grad():
        if name.split(",")[0] in OF_LIBRARIES:
            assert call(to_dtype(dtype)).isfinite().all()
        else:
            with pytest.raises(BackendUnavailableError, match=name.split(",")[0].split()[0]):
                call(to_dtype(dtype))


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
def test_the_backend_of_a_call_is_chosen_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, get = [], backend.get_backend
    with torch.no_grad():
        IN_CPP[name](to_dtype(torch.float32))  # loads the libraries
        monkeypatch.setattr(backend, "get_backend", lambda: asked.append(name) or get())
        with calls_of_cpp() as names:
            IN_CPP[name](to_dtype(torch.float32))
    assert names
    assert len(asked) == (2 if name == "expert_ffn_scatter" else 1)  # the FFN and the scatter have limits of their own


@needs_cpp
@pytest.mark.parametrize("with_gradients", [True, False])
def test_layers_are_replaced_in_cpp_without_gradients_only(with_gradients: bool) -> None:
    with torch.set_grad_enabled(with_gradients):
        chosen = backend.choose_fused(X)
    assert chosen.name == ("reference" if with_gradients else "cpu")
    assert chosen.fuses == chosen.packs_weights == (not with_gradients)
    assert not chosen.fuses_residual


@needs_cpp
@pytest.mark.parametrize("name", IN_CPP)
def test_gradients_are_those_of_the_reference_or_the_call_raises(name: str) -> None:
    if name == "sample_tokens":
        pytest.skip("a draw has no gradient")

    def gradients(chosen: str) -> list[torch.Tensor]:
        leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the original, whose id stays its own so long

        def as_leaf(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            return leaves.setdefault(id(tensor), (tensor, tensor.detach().clone().requires_grad_()))[1]

        with using_backend(chosen):
            output = IN_CPP[name](as_leaf)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        found = torch.autograd.grad((output * weights).sum(), [leaf for _, leaf in leaves.values()], allow_unused=True)
        pairs = zip(found, leaves.values(), strict=True)
        return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, (_, leaf) in pairs]

    due = gradients("reference")
    for chosen in ("auto", "cpu"):
        if chosen == "cpu" and name in {"linear", "linear_once", "conv3x3"}:
            with pytest.raises(BackendUnavailableError, match="has no gradient"):
                gradients(chosen)
            continue
        for found, wanted in zip(gradients(chosen), due, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@needs_cpp
@pytest.mark.parametrize("prepare", [accelerate, apply_patch])
def test_a_model_in_a_dtype_that_cpp_does_not_take_raises(prepare: Callable) -> None:
    var = prepare(make_tiny_var().double())
    with using_backend("cpu"), pytest.raises(BackendUnavailableError, match="float64"):
        sample(var)
    assert sample(var).isfinite().all()


@pytest.mark.parametrize("prepare", [accelerate, apply_patch])
def test_a_model_raises_where_cpp_cannot_be_built(prepare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler")
    var = prepare(make_tiny_var())
    with using_backend("cpu"), pytest.raises(BackendUnavailableError, match="no compiler"):
        sample(var)
    assert sample(var).isfinite().all()
