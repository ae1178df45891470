"""Replay whole samples of a patched model as CUDA graphs, so that the GPU never waits for Python to launch kernels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from actvar.families.requests import Request
from actvar.utils.class_swap import own_class
from actvar.utils.devices import device_of, is_on_gpu
from actvar.utils.weight_override import own_parameters
from actvar_kernels import backend_of, get_backend
from actvar_kernels.cpu_backend.packing import copies, drops

logger = logging.getLogger(__name__)

WARM_UP_RUNS = 2  # compile kernels, fill the allocator
MOST_GRAPHS = 8
"""Graphs that a model keeps; each further one takes the place of the oldest."""
KNOWN = ("torch.nn.", "actvar.")
"""Where the classes of layers are from that depend on nothing but their tensors."""


Results = tuple[Tensor, ...]
"""Images, then what else a family's samples return."""
Run = Callable[[Request], Results]
"""Draws the results of a request, kernel by kernel."""


@dataclass
class Graph:
    """Hold one captured sample.

    Args:
        request: its inputs are what a replay reads.
        replay: runs the graph.
        results: where its results are.
        copies: of weights, which the graph reads.
    """

    request: Request
    replay: Callable[[], None]
    results: Results
    copies: list

    def of(self, request: Request) -> Results:
        """Return the results of a request of the same shapes."""
        for read, wanted in zip(self.request.inputs, request.inputs, strict=True):
            read.copy_(wanted)
        self.replay()
        return tuple(result.clone() for result in self.results)


@dataclass
class SampleGraphs:
    """Keep the graphs of one patch, by what their samples have in common; copies and pickles are empty.

    Args:
        graphs: captured samples.
        pool: the memory that all of them share, or None before the first.
        weights: addresses and versions of all weights when the graphs were captured.
        refused: why none is captured any more, or None.
        said: reasons that have been logged.
    """

    graphs: dict[tuple, Graph] = field(default_factory=dict)
    pool: Any = None
    weights: tuple | None = None
    refused: str | None = None
    said: set[str] = field(default_factory=set)

    def results(self, model: Any, request: Request, run: Run, wanted: bool | str) -> Results:
        """Return the results of a request, by a graph where `wanted` and the model allow it.

        Args:
            model: the patched model.
            request: what to draw.
            run: draws eagerly.
            wanted: `Execution.cuda_graph`. With `"auto"` a graph is given up if its first results differ from `run`.

        Raises:
            ValueError: True is wanted and a graph is not possible.
        """
        if self.skips(model, wanted, why_eager(model)):
            return run(request)
        weights = weights_of(model)
        if weights != self.weights:
            self.release()
            self.weights = weights
        key = (*_shapes(request.inputs), request.settings, *_situation(device_of(model)))
        graph = self.graphs.get(key)
        if graph is not None:
            return graph.of(request)
        if self.skips(model, wanted, _why_called(model)):
            return run(request)
        if len(self.graphs) >= MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return self._first(model, key, request, run, wanted)

    def skips(self, model: Any, wanted: bool | str, reason: str | None) -> bool:
        """Return whether the model is sampled eagerly, and log why once, except on a CPU.

        Args:
            model: the patched model.
            wanted: `Execution.cuda_graph`.
            reason: why it has to be, or None.

        Raises:
            ValueError: True is wanted.
        """
        if wanted is False:
            return True
        reason = reason or (self.refused if wanted == "auto" else None)
        if reason is None:
            return False
        if wanted is True:
            raise ValueError(f"cuda_graph: True needs a sample that a graph can hold; {reason}")
        if reason not in self.said and is_on_gpu(model):
            self.said.add(reason)
            logger.info("sampled without a CUDA graph: %s", reason)
        return True

    def refuse(self, model: Any, wanted: bool | str, reason: str) -> None:
        """Log once why a sample is drawn eagerly that no graph can hold; arguments and errors are those of `skips`."""
        self.skips(model, wanted, why_eager(model) or reason)

    def described(self, model: Any, wanted: bool | str) -> Iterator[str]:
        """Yield a line that says whether a model on a GPU is sampled by graphs, and why not; arguments of `skips`."""
        if not is_on_gpu(model):
            return
        reason = "cuda_graph is False" if wanted is False else why_no_graph(model)
        reason = reason or (self.refused if wanted == "auto" else None)
        yield "a sample is one CUDA graph" if reason is None else f"no CUDA graph: {reason}"

    def release(self) -> None:
        """Drop all graphs and their memory."""
        self.graphs.clear()
        self.pool = self.weights = None

    def _first(self, model: Any, key: tuple, request: Request, run: Run, wanted: bool | str) -> Results:
        """Capture the graph of `key`, and return the results of its first request."""
        kept = request._replace(inputs=tuple(tensor.clone() for tensor in request.inputs))

        def sample() -> Results:
            return run(kept)

        eager = warmed_up(sample)
        _drop_kv_buffers(model)  # so that the graph's lie in its own memory
        try:
            self.pool = new_pool() if self.pool is None else self.pool
            replay, results = captured(sample, self.pool)
            graph = Graph(kept, replay, results, copies(_tensors(model)))
            results = graph.of(request)
        except RuntimeError as error:
            if wanted is True:
                raise RuntimeError(f"cuda_graph: the sample could not be captured as a graph: {error}") from error
            return self._give_up(f"it could not be captured ({error})", eager)
        finally:
            _drop_kv_buffers(model)
        if wanted == "auto" and not all(map(torch.equal, results, eager)):
            difference = (results[0].float() - eager[0].float()).abs().max().item()
            return self._give_up(f"its first images differ from eager ones, by up to {difference:.3g}", eager)
        self.graphs[key] = graph
        return results

    def _give_up(self, reason: str, eager: Results) -> Results:
        """Sample eagerly from here on, say so, and return `eager`."""
        self.release()
        self.refused = f"a graph was tried, and {reason}"
        self.said.add(self.refused)
        logger.warning("cuda_graph: samples are drawn eagerly from here on: %s", self.refused)
        return eager

    def __deepcopy__(self, _memo) -> SampleGraphs:
        return SampleGraphs()

    def __reduce__(self):
        return SampleGraphs, ()


def warmed_up(sample: Callable[[], Results]) -> Results:
    """Run `sample` beside the current stream, as a capture does, and return its last results."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            results = sample()
    current.wait_stream(stream)
    for result in results:
        result.record_stream(current)
    return results


def new_pool() -> Any:
    """Return a pool of memory that graphs share."""
    return torch.cuda.graph_pool_handle()


def captured(sample: Callable[[], Results], pool: Any) -> tuple[Callable[[], None], Results]:
    """Return a function that replays `sample`, and the tensors in which its results then are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = sample()
    return graph.replay, results


def why_no_graph(model: Any) -> str | None:
    """Return why a patched model cannot be sampled by a graph now, or None if it can."""
    return why_eager(model) or _why_called(model)


def why_eager(model: Any) -> str | None:
    """Return why no graph may be replayed now, even one that is there, or None."""
    state, family = model.actvar, model.actvar.family
    if "cuda_graph" not in family.loop_fields(model) or not family.loop_is_ours(model):
        kind = type(model).__name__
        return f"model: expected an actvar.models.VAR or Infinity, got {kind}; use actvar.load_var or load_infinity"
    if state.execution.sampler != "fast":
        return f"sampler: expected 'fast' in the patch's Execution, got {state.execution.sampler!r}"
    if not is_on_gpu(model):
        return f"model: expected one on a GPU, got one on {device_of(model)}"
    if backend_of("sample_tokens", model.head.weight) != "triton":
        return "backend: expected Triton, without which a graph cannot read its seed; see actvar info"
    if torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling():
        return "PyTorch records or traces what runs"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "another graph is captured"
    if state.records is not None:
        return "the choices of blocks are recorded"
    return next(watched(model, family.autoencoder(model)), None)


def _why_called(model: Any) -> str | None:
    """Return why Python may run within a layer of the model, or None.

    Such a layer has weights that a graph without it does not have. So this is asked before a capture alone.
    """
    state = model.actvar
    family = state.family
    called = family.head_called(model) is not None or any(map(family.parts_called, state.blocks(model)))
    roots = model, family.autoencoder(model)
    layers = (module for module in _modules(roots) if module not in roots)
    called = called or not all(own_class(layer).__module__.startswith(KNOWN) for layer in layers)
    return "layers that are more than their weight are called" if called else None


def watched(*roots: nn.Module) -> Iterator[str]:
    """Yield why code of others has to run within a sample: hooks, and methods that were replaced on an instance."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        yield "hooks of all modules run in Python"
    for module in _modules(roots):
        state = vars(module)
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            yield f"hooks of a {type(module).__name__} run in Python"
        if not _methods(type(module)).isdisjoint(state):
            yield f"a method of a {type(module).__name__} was replaced"


def weights_of(model: Any) -> tuple:
    """Return addresses and versions of all tensors that a sample reads, and how often their copies were dropped."""
    found = [drops()]
    for tensor in _tensors(model):
        found += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    return tuple(found)


def _tensors(model: Any) -> Iterator[Tensor]:
    """Yield all tensors that a sample reads, also weights that an adapter replaced."""
    for module in _modules((model, model.actvar.family.autoencoder(model))):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
    if model.actvar.first_tuned:
        yield from own_parameters(model).values()


def _modules(roots: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Yield all modules below `roots`, in less time than `nn.Module.modules` takes."""
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Return the names of the public methods of a class."""
    return frozenset(name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name)))


def _situation(device: torch.device) -> tuple:
    """Return the settings of PyTorch and of the backend that a captured sample keeps."""
    cudnn = torch.backends.cudnn
    return (
        get_backend(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32),
    )


def _shapes(tensors: tuple[Tensor, ...]) -> Iterator[tuple]:
    """Yield shape and dtype of each tensor."""
    for tensor in tensors:
        yield tensor.shape, tensor.dtype


def _drop_kv_buffers(model: Any) -> None:
    """Free the K/V buffers that blocks keep between samples."""
    state = model.actvar
    for block in state.blocks(model):
        block.actvar.cache.kv_buffer = None
