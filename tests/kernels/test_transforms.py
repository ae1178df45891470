"""While PyTorch traces, exports or transforms a computation its own operations run, so that it sees all of it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from support.helpers import make_tiny_var
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from actvar import ActVARConfig, accelerate, apply_patch
from actvar.models import VAR
from actvar_kernels import BackendUnavailableError, normalize_modulate
from actvar_kernels.backend import using_backend
from actvar_kernels.cpu_backend import cpu

Computation = Callable[[torch.Tensor], torch.Tensor]


def dense(var: VAR) -> VAR:
    return var


def sparse(var: VAR) -> VAR:
    return apply_patch(var, ActVARConfig(num_experts=4))


def all_tokens(var: VAR) -> VAR:
    return apply_patch(var, ActVARConfig(num_experts=4, kv="all"))


def teacher_forced(prepare: Callable[[VAR], VAR]) -> tuple[Computation, torch.Tensor]:
    """Logits of two images as a function of the transformer's inputs, and such inputs."""
    var = prepare(make_tiny_var()).requires_grad_(False)
    inputs = torch.randn(2, var.L - 1, 8, generator=torch.Generator().manual_seed(0))
    return lambda x: var(torch.tensor([1, 2]), x), inputs


def decoded(_prepare: Callable) -> tuple[Computation, torch.Tensor]:
    vae = make_tiny_var(Cvae=16).vae_proxy[0].requires_grad_(False)
    return lambda f_hat: vae.fhat_to_img(f_hat), torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))


def encoded(_prepare: Callable) -> tuple[Computation, torch.Tensor]:
    vae = make_tiny_var(Cvae=16).vae_proxy[0].requires_grad_(False)
    image = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    return lambda x: vae.img_to_features(x), image


def one_scale(prepare: Callable[[VAR], VAR]) -> tuple[Computation, torch.Tensor]:
    """The first scale with a K/V cache, as a function of the blocks' input."""
    var = prepare(make_tiny_var()).requires_grad_(False)
    cond = var.class_emb(torch.tensor([1, 2]))

    def logits(x: torch.Tensor) -> torch.Tensor:
        for block in var.blocks:
            block.attn.kv_caching(True)
        try:
            for block in var.blocks:
                x = block(x=x, cond_BD=cond, attn_bias=None)
            return var.get_logits(x, cond)
        finally:
            for block in var.blocks:
                block.attn.kv_caching(False)

    return logits, torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(0))


class AsModule(torch.nn.Module):
    def __init__(self, computation: Computation):
        super().__init__()
        self.forward = computation


def traced(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are read, as in the dense model
        trace = torch.jit.trace(computation, torch.zeros_like(x), check_trace=False)
    assert "actvar_kernels::" not in str(trace.graph)
    return trace(x)


def exported(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return computation(x)

    program = torch.export.export(Module(), (torch.zeros_like(x),))
    assert "actvar_kernels" not in str(program.graph)
    return program.module()(x)


def vmapped(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    found = torch.func.vmap(computation)(torch.stack((x, 2 * x)))
    torch.testing.assert_close(found[1], computation(2 * x), rtol=1e-3, atol=1e-3)
    return found[0]


def with_forward_derivatives(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    direction = torch.ones_like(x)
    found, derivative = torch.func.jvp(computation, (x,), (direction,))
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output = computation(leaf)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((output * weights).sum(), leaf)
    torch.testing.assert_close((derivative * weights).sum(), (gradient * direction).sum(), rtol=2e-3, atol=1e-2)
    return found


def compiled(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(computation, backend="eager", fullgraph=True)(x)


class Counter(TorchFunctionMode):
    """Counts the functions of torch that run."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        type(self).calls += 1
        return function(*args, **(kwargs or {}))


def in_a_function_mode(computation: Computation, x: torch.Tensor) -> torch.Tensor:
    Counter.calls = 0
    with torch.no_grad(), Counter():
        found = computation(x)
    assert Counter.calls > 20
    return found


SEEN_BY = [traced, exported, vmapped, with_forward_derivatives, compiled, in_a_function_mode]
PREPARED = [dense, accelerate, sparse, all_tokens]


@pytest.mark.parametrize("see", SEEN_BY, ids=lambda see: see.__name__)
@pytest.mark.parametrize("prepare", PREPARED, ids=lambda prepare: prepare.__name__)
@pytest.mark.parametrize("gradients", [False, True])
def test_teacher_forcing_is_seen(prepare: Callable, see: Callable, gradients: bool) -> None:
    computation, x = teacher_forced(prepare)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(see(computation, x), computation(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("see", SEEN_BY, ids=lambda see: see.__name__)
@pytest.mark.parametrize("make", [decoded, encoded])
def test_the_autoencoder_is_seen(make: Callable, see: Callable) -> None:
    computation, x = make(dense)
    with torch.no_grad():
        torch.testing.assert_close(see(computation, x), computation(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("see", [traced, vmapped, with_forward_derivatives, in_a_function_mode])
@pytest.mark.parametrize("prepare", [dense, accelerate, sparse])
def test_a_scale_of_a_sample_is_seen(prepare: Callable, see: Callable) -> None:
    computation, x = one_scale(prepare)
    with torch.no_grad():
        torch.testing.assert_close(see(computation, x), computation(x), rtol=1e-3, atol=1e-3)


def test_the_exported_program_can_be_saved_and_loaded() -> None:
    computation, x = teacher_forced(sparse)

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return computation(x)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), computation(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))
def test_kernels_asked_for_by_name_say_that_they_are_not_seen() -> None:
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    with using_backend("cpu"), pytest.raises(BackendUnavailableError, match="transforms the call"):
        torch.func.vmap(lambda x: normalize_modulate(x, scale, scale))(x[None])


def operators_of(graphs: list[torch.fx.GraphModule]) -> set[str]:
    return {
        str(node.target).split(".")[1]
        for graph in graphs
        for node in graph.graph.nodes
        if str(node.target).startswith("actvar_kernels.")
    }


def test_compiled_blocks_keep_the_registered_operators() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, _inputs) -> Callable:
        graphs.append(graph)
        return graph.forward

    computation, x = teacher_forced(sparse)
    with torch.no_grad():
        found = torch.compile(computation, backend=collect)(x)
        torch.testing.assert_close(found, computation(x), rtol=1e-3, atol=1e-3)
    assert "expert_ffn" in operators_of(graphs)


@pytest.mark.parametrize("prepare", PREPARED, ids=lambda prepare: prepare.__name__)
def test_a_counter_sees_the_same_flops_whatever_the_backend(prepare: Callable) -> None:
    computation, x = teacher_forced(prepare)

    def flops(backend: str) -> int:
        with using_backend(backend), torch.no_grad(), FlopCounterMode(display=False) as counter:
            computation(x)
        return counter.get_total_flops()

    assert flops("auto") == flops("reference") > 0
    if prepare is sparse:
        assert flops("auto") < teacher_forced_flops_of_dense()


def teacher_forced_flops_of_dense() -> int:
    computation, x = teacher_forced(dense)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        computation(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("prepare", PREPARED, ids=lambda prepare: prepare.__name__)
def test_fake_tensors_go_through(prepare: Callable) -> None:
    computation, x = teacher_forced(prepare)
    due = computation(x)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        found = computation(torch.empty_like(x))
    assert (found.shape, found.dtype) == (due.shape, due.dtype)
