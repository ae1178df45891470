"""Check the tensors of an adapter file against a model, and merge low-rank factors into the weights they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from actvar.sparse.block_state import hidden_in_order
from actvar.sparse.state import patch_state
from actvar.utils.files import read_mapped
from actvar.utils.low_rank import Factors, merged
from actvar.utils.weight_override import own_weights
from actvar_kernels.situation import are_plain

WEIGHTS, FACTORS = "weights.", "factors."
"""Beginnings of the names of changed weights in an adapter file: whole ones, and those stored as factors."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdapterError(ValueError):
    """Report an adapter file that cannot be read, or does not fit the model, which is unchanged."""


def checked(path: str | Path, name: str, found: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the values of `found` in `dtype`, in memory; raise AdapterError if they do not fit or are not finite."""
    if list(found.shape) != list(shape):
        raise AdapterError(f"{path}: {name}: expected shape {list(shape)}, got {list(found.shape)}")
    if found.dtype not in DTYPES:
        raise AdapterError(f"{path}: {name}: expected floating-point values of {DTYPES}, got {found.dtype}")
    converted = read_mapped(found, "cpu", dtype)
    if not converted.isfinite().all():
        raise AdapterError(f"{path}: {name}: expected finite values in {dtype}")
    return converted


def check_orders(path: str | Path, hidden: int, orders: Sequence[torch.Tensor | None]) -> None:
    """Raise AdapterError unless every order is None or a permutation of the `hidden` units."""
    for index, order in enumerate(orders):
        if order is None:
            continue
        if order.shape != (hidden,) or order.is_floating_point():
            found = f"shape {list(order.shape)} in {order.dtype}"
            raise AdapterError(f"{path}: blocks.{index}.order: expected {hidden} integers, got {found}")
        if not torch.equal(order.long().sort().values, torch.arange(hidden, device="cpu")):
            raise AdapterError(f"{path}: blocks.{index}.order: expected each of 0 ... {hidden - 1} once")


def factor_tensors(factors: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """Return the factors of changed weights by their name in an adapter file."""
    return {
        f"{FACTORS}{name}.{side}": tensor for name, pair in factors.items() for side, tensor in pair._asdict().items()
    }


def rank_of(factors: Mapping[str, Factors]) -> int | None:
    """Return the rank of factors, which is the same for all weights; None without any."""
    return next((len(pair.A) for pair in factors.values()), None)


def check_factors(path: str | Path, rank: int | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that the factors among the tensors of a file come in pairs of the rank that its metadata tells.

    Args:
        path: the file.
        rank: of the factors, by the metadata; None without factors.
        tensors: all tensors of the file.

    Raises:
        AdapterError: they do not.
    """
    stored = sorted(name for name in tensors if name.startswith(FACTORS))
    if rank is not None and rank < 1:
        raise AdapterError(f"{path}: rank: expected 1 or more, got {rank}")
    if (rank is None) is not (not stored):
        found = stored[:4] or "none"
        raise AdapterError(f"{path}: expected factors and their rank or neither, got rank {rank} and {found}")
    for name in stored:
        weight, _, side = name.rpartition(".")
        if side not in Factors._fields:
            raise AdapterError(f"{path}: {name}: expected a factor .A or .B of a weight")
        missing = [f"{weight}.{other}" for other in Factors._fields if f"{weight}.{other}" not in tensors]
        if missing:
            raise AdapterError(f"{path}: expected both factors of a weight, missing: {missing}")
        shape = tensors[name].shape
        if len(shape) != 2 or shape[0 if side == "A" else 1] != rank:
            expected = f"[{rank}, inputs]" if side == "A" else f"[outputs, {rank}]"
            raise AdapterError(f"{path}: {name}: expected shape {expected}, got {list(shape)}")


def checked_factors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Factors]:
    """Return the factors among the tensors of a file by the name of their weight, in memory, each in its own dtype.

    Args:
        path: the file.
        tensors: all tensors of the file, whose factors come in pairs.
        parameters: the parameters of the model that an adapter may change, by name.

    Raises:
        AdapterError: factors that do not fit their parameter, or a parameter that they cannot be merged into.
    """
    factors = {}
    for name, own in parameters.items():
        name_A, name_B = (f"{FACTORS}{name}.{side}" for side in Factors._fields)
        if name_A not in tensors:
            continue
        if own.ndim != 2 or own.dtype not in DTYPES or not are_plain(own):
            kind = f"{type(own).__name__} of shape {list(own.shape)} in {own.dtype}"
            raise AdapterError(f"{path}: {name_A}: expected a plain matrix of {DTYPES} to merge it into, got {kind}")
        A, B = tensors[name_A], tensors[name_B]
        outputs, inputs = own.shape
        A = checked(path, name_A, A, (len(A), inputs), A.dtype)
        B = checked(path, name_B, B, (outputs, len(A)), B.dtype)
        factors[name] = Factors(A, B)
    return factors


def merged_weights(
    path: str | Path, model: nn.Module, orders: Sequence[torch.Tensor | None], factors: Mapping[str, Factors]
) -> dict[str, nn.Parameter]:
    """Return `W + B A` for each pair of factors by the name of its weight; nothing is changed.

    Args:
        path: the file.
        model: a patched model, without wrappers.
        orders: of the hidden units of each block, in which those of the factors lie; None for the original one.
        factors: by the name of their weight.

    Raises:
        AdapterError: a sum is not finite in the dtype of its weight.
    """
    sums: dict[str, torch.Tensor] = {}
    with own_weights(model):
        names = {model.get_parameter(name): name for name in factors}
        for block, order in zip(patch_state(model).blocks(model), orders, strict=True):
            for own, values in hidden_in_order(block, order).items() if names else ():
                if own in names:
                    name = names.pop(own)
                    sums[name] = merged(values, factors[name])
        sums |= {name: merged(own, factors[name]) for own, name in names.items()}
    for name, weight in sums.items():
        if not weight.isfinite().all():
            raise AdapterError(f"{path}: {FACTORS}{name}: expected a finite sum with the weight in {weight.dtype}")
    return {name: nn.Parameter(weight, requires_grad=False) for name, weight in sums.items()}
