"""Comparisons while a patched model samples: blocks with their dense forward, operations with the reference."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import actvar.families.infinity
import actvar.sparse.block
import actvar.sparse.selection
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.sparse.state import patch_state
from actvar.verify.operations import OPERATIONS, WRITABLE
from actvar.verify.report import Check
from actvar.verify.rounding import difference, measured, moved, unmoved
from actvar_kernels.backend import BackendUnavailableError, get_backend, using_backend
from actvar_kernels.operations.exact import Widen, wide

CALLERS = (actvar.sparse.selection, actvar.sparse.block, actvar.families.infinity)
"""Modules by whose names blocks call the operations."""


def dtype_of(var: Any) -> str:
    """Return the name of the dtype of the weights of the model's blocks."""
    return str(next(blocks_of(var)[0].parameters()).dtype).removeprefix("torch.")


@contextmanager
def compared_blocks(var: nn.Module, name: str) -> Iterator[list[Check]]:
    """Compare each block of a model that samples with its dense forward, on the same input and cache.

    Args:
        var: a patched model.
        name: of the checks.

    Yields:
        The checks so far.
    """
    checks: list[Check] = []
    caches_before: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    dtype, backend = dtype_of(var), get_backend()
    family = family_of(var)

    def before(block, _args, _kwargs):
        caches_before.append(family.cache(block).read())

    def after(block, args, kwargs, output):
        past, grown = caches_before.pop(), _cached(block)
        call = family.block_call(*args, **kwargs)
        scale = _scale_of(var, output)
        parts = ("output",) if scale == len(patch_state(var).schedule) - 1 else ("output", "keys", "values")
        got, dense = (output, *grown)[: len(parts)], _dense(block, past, call)[: len(parts)]
        cache = family.cache(block)
        cache.start()  # the copies of the block need no cache

        @functools.cache
        def due(widen: Widen) -> tuple[torch.Tensor, ...]:
            return _dense(_widened(block, widen), wide(past), wide(call))[: len(parts)]

        # Without any difference the exact values are not needed.
        equal = all(torch.equal(*pair) for pair in zip(got, dense, strict=True))
        for i, (part, value, reference) in enumerate(zip(parts, got, dense, strict=True)):
            due_part = dense[i] if equal else due(unmoved)[i]
            limits = measured(value, due_part, reference, due_part, lambda i=i: due(moved)[i])
            checks.append(Check(name, dtype, backend, part, *limits, block.actvar.block_index, scale))
        cache.write(*grown)

    handles = []
    for block in blocks_of(var):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    with _removing(handles):
        yield checks


@contextmanager
def compared_operations(var: nn.Module) -> Iterator[list[Check]]:
    """Run each operation that a block calls on the backend in force and on the reference, and compare the results.

    Both get the same arguments. The block continues with the reference's result.

    Args:
        var: a patched model.

    Yields:
        The checks so far.
    """
    checks: list[Check] = []
    backend, dtype = get_backend(), dtype_of(var)
    place: dict[str, int] = {}

    def note_place(block, args, kwargs):
        x = block.actvar.family.block_call(*args, **kwargs).x
        place.update(block=block.actvar.block_index, scale=_scale_of(var, x))

    def compared(name: str, operation: Callable) -> Callable:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            weights = {id(v): v for v in arguments.values() if isinstance(v, nn.Parameter)}
            # One deep copy of all arguments, in which those that share memory still share it.
            copies = copy.deepcopy(arguments, weights)
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
                for what, error, tolerance in _differences(name, arguments, copies, reference, result):
                    checks.append(Check(name, dtype, backend, what, error, tolerance, **place))
            return reference

        return call

    originals = {
        (caller, name): getattr(caller, name) for caller in CALLERS for name in OPERATIONS if hasattr(caller, name)
    }
    with _removing([block.register_forward_pre_hook(note_place, with_kwargs=True) for block in blocks_of(var)]):
        try:
            for (caller, name), operation in originals.items():
                setattr(caller, name, compared(name, operation))
            yield checks
        finally:
            for (caller, name), operation in originals.items():
                setattr(caller, name, operation)


@contextmanager
def _removing(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scale_of(var: nn.Module, x: torch.Tensor) -> int:
    """Return the number of the scale that has as many tokens as `x` `[R, L, C]`."""
    return [scale.tokens for scale in patch_state(var).schedule].index(x.shape[1])


def _cached(block: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values in the cache of a block that has run."""
    cached = block.actvar.family.cache(block).read()
    if cached is None:
        raise RuntimeError(
            "expected keys and values in the cache of a block that has run, got none; cache while sampling"
        )
    return cached


def _dense(
    block: Any, past: tuple[torch.Tensor, torch.Tensor] | None, call: BlockCall
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output, keys and values of the block's dense forward after the cache `past`."""
    cache = block.actvar.family.cache(block)
    cache.start()
    if past is not None:
        cache.write(*past)
    output = block.dense_forward(call)
    return output, *_cached(block)


def _widened(block: nn.Module, widen: Widen) -> nn.Module:
    """Return a copy of the block in float64, whose matrices are those of the block by `widen`."""
    twin = copy.deepcopy(block).double()
    for parameter, own in zip(twin.parameters(), block.parameters(), strict=True):
        if parameter.dim() > 1:
            parameter.data = widen(own)
    return twin


def _differences(
    name: str, arguments: dict[str, Any], copies: dict[str, Any], reference: Any, result: Any
) -> Iterator[tuple[str, float, float]]:
    """Yield the name, the error and the tolerance of each part of a result.

    Args:
        name: of the operation.
        arguments: of the reference, after its call.
        copies: the same arguments of the other backend, after its call.
        reference: the reference's result.
        result: the other backend's result.
    """
    expected, found = ([(t.shape, t.dtype) for t in _tensors(value)] for value in (reference, result))
    if expected != found:
        yield f"shapes and dtypes {found}, expected {expected}", math.inf, 0.0
        return
    pairs = zip(_not_writable(arguments), _not_writable(copies), strict=True)
    yield "arguments left alone", sum(difference(*pair) for pair in pairs), 0.0
    # Blocks ask for rows of bytes only with weights in eight bits, which are checked elsewhere.
    numbers = {key: value for key, value in arguments.items() if key != "form"}
    parts = OPERATIONS[name](unmoved, **numbers)

    def due_if_moved(position: int) -> torch.Tensor:
        return list(OPERATIONS[name](moved, **numbers)(result))[position][2]

    part_pairs = zip(parts(reference), parts(result), strict=True)
    for i, ((what, reference_value, due_of_reference), (_, value, due)) in enumerate(part_pairs):
        yield what, *measured(value, due, reference_value, due_of_reference, lambda i=i: due_if_moved(i))


def _not_writable(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operation must leave alone: those that are in no writable argument."""
    written = {id(tensor) for name in WRITABLE for tensor in _tensors(arguments.get(name))}
    others = _tensors(tuple(value for name, value in arguments.items() if name not in WRITABLE))
    return [tensor for tensor in others if id(tensor) not in written]


def _tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors in `value`, a tensor or a tuple of values in any depth."""
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []
