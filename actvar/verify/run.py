"""Check a model with ActVAR: rates of 1 against dense, backends against the reference, removal, the public class.

The tolerances are derived in `actvar.verify.rounding`. Choices, copies and tokens have a tolerance of 0, and their
error is the number of elements that differ.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

import actvar.sparse.block
import actvar.sparse.selection
from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.models.public_code import public_classes, public_twin
from actvar.patching.adapter import read_adapter
from actvar.patching.patch import patched_silently
from actvar.sampling.request import Sampling
from actvar.verify.operations import OPERATIONS, WRITABLE
from actvar.verify.report import Check, Report
from actvar.verify.rounding import difference, measured, moved, unmoved
from actvar_kernels.backend import BackendUnavailableError, choose_fused, get_backend, using_backend
from actvar_kernels.cpu_backend import cpu
from actvar_kernels.operations.exact import Widen, wide


def verify(
    load: Callable[[torch.dtype], nn.Module],
    config: ActVARConfig,
    adapter: str | Path | None,
    sampling: Sampling,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    backends: Sequence[str] | None = None,
    public_folder: Path | None = None,
    execution: Execution | None = None,
) -> Report:
    """Sample with every dtype and backend, and compare block by block and operation by operation.

    A backend whose operations differ is not tried with rates of 1.

    Args:
        load: gives the unpatched `actvar.models.VAR` with weights of a dtype, in eval mode.
        config, adapter: rates and gates with which operations, removal and the public class are checked.
        sampling: what is drawn.
        dtypes: float32 is always among them, since tokens and removal are compared in it alone.
        backends: None for those that run on the model's device.
        public_folder: a clone of the public VAR code, whose class must give the same tokens.
        execution: how patched models are run, but tokens are drawn by `sampler="torch"`; None for the one that the
            adapter recommends, otherwise the default.

    Raises:
        BackendUnavailableError: a backend asked for cannot run here.
        ImportError: the public code needs a package that is not installed.
        ValueError: a configuration, adapter or folder that does not fit; bfloat16 in Triton's interpreter.
    """
    classes = None if public_folder is None else public_classes(public_folder)
    if execution is None:
        execution = Execution() if adapter is None else read_adapter(adapter).execution
    execution = replace(execution, sampler="torch")
    patched = functools.partial(patched_silently, execution=execution)
    checks: list[Check] = []
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        var = load(dtype)
        backends = backends or available_backends(var.head.weight.device, dtypes)
        for backend in backends:
            _expect_backend(backend, var.head.weight.device, dtypes)
        if dtype == torch.float32:
            checks += _all_checks(var, patched, config, adapter, sampling, backends, classes)
        else:
            with patched(var, config, adapter):
                checks += _checks_of_backends(var, patched, config, sampling, backends)
        del var
    return Report(tuple(checks))


def available_backends(device: torch.device, dtypes: Sequence[torch.dtype] = ()) -> tuple[str, ...]:
    """Backends that run on `device`, the reference first."""
    found = ["reference"]
    for name in ("cpu", "triton"):
        with contextlib.suppress(BackendUnavailableError):
            _expect_backend(name, device, dtypes)
            found.append(name)
    return tuple(found)


def _expect_backend(name: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    if name == "triton":
        with using_backend(name):
            choose_fused(torch.empty(0, device=device))
    if name == "cpu":
        reason = cpu.why_unavailable() if device.type == "cpu" else f"it needs CPU tensors, got {device}"
        if torch.float16 in dtypes:
            reason = "it does not take float16"
        if reason is not None:
            raise BackendUnavailableError(f"the 'cpu' backend: {reason}")
    if name == "triton" and device.type == "cpu" and torch.bfloat16 in dtypes:
        raise ValueError("bfloat16: Triton's interpreter computes it wrongly; leave it out, or use a GPU")


def _all_checks(var, patched, config, adapter, sampling, backends, classes) -> Iterator[Check]:
    """Yield the checks of the backends, of removal, and of the public class; `var` is in float32.

    `patched` patches a model as `patched_silently` does.
    """
    before = _fingerprint(var)
    with using_backend("reference"):
        dense = _sampled(var, sampling, "dense")
    with patched(var, config, adapter):
        yield from _checks_of_backends(var, patched, config, sampling, backends, dense)
    with using_backend("reference"):
        after, again = _fingerprint(var), _sampled(var, sampling, "patch removed")
        for what, due in before.items():
            differing = sum(due.get(name) != after[what].get(name) for name in due.keys() | after[what].keys())
            yield Check("removal", "float32", "reference", what, float(differing))
        yield Check("removal", "float32", "reference", "images", difference(again.images, dense.images))
        yield from _same_tokens("removal", var, again, dense)
        if classes is not None:
            public = public_twin(var, classes)
            yield from _same_tokens("public class", var, _sampled(public, sampling, "public class"), dense)
            with patched(var, config, adapter):
                sparse = _sampled(var, sampling, "patched")
            with patched(public, config, adapter):
                of_public = _sampled(public, sampling, "public class, patched")
            yield from _same_tokens("public class, patched", var, of_public, sparse)


def _checks_of_backends(var, patched, config, sampling, backends, dense=None) -> Iterator[Check]:
    """The operations of a patched `var`, then rates of 1 against dense; tokens against those of `dense` if given."""
    rates_1 = replace(config, token_rates=(1.0,) * len(config.scales), ffn_rate=1.0)
    for backend in backends:
        with using_backend(backend):
            with _operations(var) as checks:
                _sampled(var, sampling, f"operations, {backend}")
            yield from checks
            if not all(check.passed for check in checks):
                continue  # sampling with a backend that errs may raise anywhere
            for name, forced in (("rates 1", False), ("rates 1, forced", True)):
                with patched(var, replace(rates_1, always_sparse=forced), None), _blocks(var, name) as checks:
                    sampled = _sampled(var, sampling, f"{name}, {backend}")
                yield from checks
                if dense is not None:
                    yield from _same_tokens(f"{name}, tokens", var, sampled, dense)


@dataclass(frozen=True)
class _Sampled:
    """Token maps `[B, L]` of every scale, and the images."""

    tokens: list[torch.Tensor]
    images: torch.Tensor


def _sampled(var: nn.Module, sampling: Sampling, title: str) -> _Sampled:
    tokens: list[torch.Tensor] = []
    title = f"{title}, {_dtype_of(var)}"
    family = family_of(var)
    with tqdm(total=len(family.maps(var)), desc=title, leave=False, disable=None) as bar:

        def count(_scale: int, drawn: torch.Tensor, _features: torch.Tensor) -> None:
            tokens.append(drawn.clone())
            bar.update()

        with family.watch_scales(var, count):
            return _Sampled(tokens, sampling.run(var))


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtype_of(var: nn.Module) -> str:
    return str(var.head.weight.dtype).removeprefix("torch.")


def _same_tokens(name: str, var: nn.Module, sampled: _Sampled, due: _Sampled) -> Iterator[Check]:
    for scale, (got, wanted) in enumerate(zip(sampled.tokens, due.tokens, strict=True)):
        yield Check(name, _dtype_of(var), get_backend(), "tokens", difference(got, wanted), scale=scale)


@contextmanager
def _blocks(var: nn.Module, name: str) -> Iterator[list[Check]]:
    """Compare each block of a patched model with its dense forward, on the input and the cache it is called with."""
    checks: list[Check] = []
    found: list[tuple] = []
    dtype, backend = _dtype_of(var), get_backend()

    family = family_of(var)

    def before(block, _args, _inputs):
        found.append(family.cache(block).read())

    def after(block, args, inputs, output):
        cache = family.cache(block)
        past, grown = found.pop(), cache.read()
        call = family.block_call(*args, **inputs)
        scale = _scale_of(var, output)
        parts = ("output",) if scale == len(family.maps(var)) - 1 else ("output", "keys", "values")
        got, dense = (output, *grown)[: len(parts)], _dense(block, past, call)[: len(parts)]
        cache.start()  # copies need no cache

        @functools.cache
        def due(widen: Widen) -> tuple[torch.Tensor, ...]:
            return _dense(_widened(block, widen), wide(past), wide(call))[: len(parts)]

        equal = all(torch.equal(*pair) for pair in zip(got, dense, strict=True))
        for i, (part, value, reference) in enumerate(zip(parts, got, dense, strict=True)):
            of_part = dense[i] if equal else due(unmoved)[i]
            limits = measured(value, of_part, reference, of_part, lambda i=i: due(moved)[i])
            checks.append(Check(name, dtype, backend, part, *limits, block.actvar.block_index, scale))
        cache.write(*grown)

    handles = []
    for block in blocks_of(var):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    with _removing(handles):
        yield checks


def _dense(block: nn.Module, past: tuple | None, call: BlockCall) -> tuple[torch.Tensor, ...]:
    """Return output, keys and values of the block's dense forward after the cache `past`."""
    cache = block.actvar.family.cache(block)
    cache.start()
    if past is not None:
        cache.write(*past)
    output = block.dense_forward(call)
    return output, *cache.read()


def _widened(block: nn.Module, widen: Widen) -> nn.Module:
    """Return a copy of the block in float64, with the matrices that `widen` gives."""
    twin = copy.deepcopy(block).double()
    for parameter, own in zip(twin.parameters(), block.parameters(), strict=True):
        if parameter.dim() > 1:
            parameter.data = widen(own)
    return twin


def _scale_of(var: nn.Module, x: torch.Tensor) -> int:
    return [height * width for height, width in family_of(var).maps(var)].index(x.shape[1])


@contextmanager
def _operations(var: nn.Module) -> Iterator[list[Check]]:
    """Run each operation that a block calls on the reference and on the backend in force, on the same arguments; the
    block goes on with what the reference gave."""
    checks: list[Check] = []
    backend, dtype = get_backend(), _dtype_of(var)
    place: dict[str, int] = {}

    def note(block, args, inputs):
        x = block.actvar.family.block_call(*args, **inputs).x
        place.update(block=block.actvar.block_index, scale=_scale_of(var, x))

    def compared(name: str, operation: Callable) -> Callable:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            weights = {id(v): v for v in arguments.values() if isinstance(v, nn.Parameter)}
            copies = copy.deepcopy(arguments, weights)  # what shares memory still does
            with using_backend("reference"):
                reference = operation(**arguments)
            try:
                result = operation(**copies)
            except BackendUnavailableError:
                raise
            except Exception as error:
                checks.append(Check(name, dtype, backend, f"raised {error!r}", math.inf, **place))
                return reference
            with using_backend("reference"):
                for what, *measured in _compared(name, arguments, copies, reference, result):
                    checks.append(Check(name, dtype, backend, what, *measured, **place))
            return reference

        return call

    callers = {name: actvar.sparse.selection if name == "select_tokens" else actvar.sparse.block for name in OPERATIONS}
    originals = {name: getattr(caller, name) for name, caller in callers.items()}
    with _removing([block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_of(var)]):
        try:
            for name, operation in originals.items():
                setattr(callers[name], name, compared(name, operation))
            yield checks
        finally:
            for name, operation in originals.items():
                setattr(callers[name], name, operation)


def _compared(name: str, arguments: dict, copies: dict, reference, result) -> Iterator[tuple[str, float, float]]:
    """What was compared, its error and tolerance."""
    kinds = [[(tensor.shape, tensor.dtype) for tensor in _tensors(value)] for value in (reference, result)]
    if kinds[0] != kinds[1]:
        yield f"shapes and dtypes {kinds[1]}, expected {kinds[0]}", math.inf, 0.0
        return
    kept = [_not_writable(of) for of in (arguments, copies)]
    yield "arguments left alone", sum(difference(*pair) for pair in zip(*kept, strict=True)), 0.0
    parts = OPERATIONS[name](unmoved, **arguments)

    def if_moved(position: int) -> torch.Tensor:
        return list(OPERATIONS[name](moved, **arguments)(result))[position][2]

    compared = zip(parts(reference), parts(result), strict=True)
    for i, ((what, of_reference, due_of_reference), (_, value, due)) in enumerate(compared):
        yield what, *measured(value, due, of_reference, due_of_reference, lambda i=i: if_moved(i))


def _not_writable(arguments: dict) -> list[torch.Tensor]:
    """Tensors that an operation must leave alone: those that no writable argument is."""
    written = {id(tensor) for name in WRITABLE for tensor in _tensors(arguments.get(name))}
    others = _tensors(tuple(value for name, value in arguments.items() if name not in WRITABLE))
    return [tensor for tensor in others if id(tensor) not in written]


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _fingerprint(var: nn.Module) -> dict[str, dict]:
    """All that removal must leave as it was, each by name."""
    state = var.state_dict()
    return {
        "classes and attributes": {n: (type(m), sorted(vars(m)), list(m._modules)) for n, m in var.named_modules()},
        "state_dict keys": dict(enumerate(state)),
        "state_dict tensors": {name: (t.shape, t.dtype, t.device, _digest(t)) for name, t in state.items()},
    }


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).digest()
