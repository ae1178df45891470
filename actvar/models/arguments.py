"""Check the arguments of sampling before anything runs, and let one thread at a time use a model."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from actvar_kernels.checks import as_integer, as_items, as_number

SEEDS = range(-(2**63), 2**64)
"""Seeds that `torch.Generator.manual_seed` takes."""

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_threads: dict[int, int] = {}
"""The thread that uses a model, by the model's id; `dict.setdefault` is atomic, and no lock can be left locked."""


def checked_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer of any kind (`actvar_kernels.checks.as_integer`) as an int.

    Args:
        name: name of the argument, for errors.
        value: any object.
        least, most: the range; None for `most` is no bound.

    Raises:
        TypeError: `value` is no integer.
        ValueError: `value` is not from `least` to `most`.
    """
    wanted = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    number = as_integer(name, value, wanted)
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def checked_finite(name: str, value: object) -> float:
    """Return a real number of any kind (`actvar_kernels.checks.as_number`) as a float.

    Args:
        name: name of the argument, for errors.
        value: any object.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is not finite.
    """
    number = as_number(name, value, "a finite number")
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


class Draw(NamedTuple):
    """Hold the arguments of `VAR.autoregressive_infer_cfg` that say how tokens are drawn, as Python's own numbers."""

    g_seed: int | tuple[int, ...] | None
    cfg: float
    top_k: int
    top_p: float


def checked_draw(
    g_seed: int | Sequence[int] | None, cfg: float, top_k: int, top_p: float, vocabulary: int | None = None
) -> Draw:
    """Check the arguments of `VAR.autoregressive_infer_cfg` except the labels, and convert numbers of any kind.

    Args:
        g_seed: one seed, several as a sequence or a 1-d array or tensor of integers, or None.
        cfg: guidance strength.
        top_k: number of tokens to draw from, 0 for all.
        top_p: probability that the tokens to draw from reach together, 0 for all.
        vocabulary: number of tokens in all, which bounds `top_k`; None if it is not known yet.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a seed outside `SEEDS`, a cfg that is not finite, a top_k outside 0 ... vocabulary, a top_p outside
            [0, 1].
    """
    seeds = as_items(g_seed)
    if seeds is not None:
        g_seed = tuple(checked_integer("g_seed", seed, SEEDS[0], SEEDS[-1]) for seed in seeds)
    elif g_seed is not None:
        g_seed = checked_integer("g_seed", g_seed, SEEDS[0], SEEDS[-1])
    cfg, top_p = checked_finite("cfg", cfg), as_number("top_p", top_p)
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number from 0 to 1, got {top_p}")
    top_k = checked_integer("top_k", top_k, 0)
    if vocabulary is not None and top_k > vocabulary:
        raise ValueError(f"top_k: the model has {vocabulary} tokens to choose from, got {top_k}")
    return Draw(g_seed, cfg, top_k, top_p)


def checked_labels(
    B: int, label_B: int | torch.Tensor | None, num_classes: int, device: torch.device
) -> int | torch.Tensor | None:
    """Return `label_B` of `VAR.autoregressive_infer_cfg` after checks, a tensor as int64.

    Negative labels in a tensor become `num_classes`, the unconditional one. Values of a tensor on the CPU are read.
    Reading values on a GPU would wait for the GPU. An assertion in the stream, also in a CUDA graph's, finds a label
    there that is too high. A failed assertion ends the process's use of the GPU ("device-side assert triggered"), so
    check labels from outside before.

    Args:
        B: batch size.
        label_B: one label for all images, an integer tensor `[B]`, or None.
        num_classes: classes of the model.
        device: device of the model.

    Raises:
        TypeError: a batch size or labels of another type, such as a float tensor.
        ValueError: a batch of none, a label outside 0 ... num_classes - 1 that is not negative, a tensor that is not
            `[B]` or on another device.
    """
    B = checked_integer("B", B, 1)
    classes = f"labels from 0 to {num_classes - 1}, or negative for unconditional images"
    if label_B is None:
        return None
    if not isinstance(label_B, torch.Tensor):
        try:
            label_B = as_integer("label_B", label_B)
        except TypeError as error:
            wanted = "None, an int or an integer tensor [B]"
            raise TypeError(f"label_B: expected {wanted}, got {type(label_B).__name__}") from error
        if label_B >= num_classes:
            raise ValueError(f"label_B: expected {classes}, got {label_B}")
        return label_B
    if label_B.dtype not in LABEL_DTYPES or label_B.layout != torch.strided:
        raise TypeError(f"label_B: expected an integer tensor, got {label_B.dtype}, {label_B.layout}")
    if label_B.shape != (B,) or label_B.device != device:
        got = f"{list(label_B.shape)} on {label_B.device}"
        raise ValueError(f"label_B: expected a tensor of shape [{B}] on {device}, got {got}")
    label_B = label_B.long()
    if torch._C._len_torch_dispatch_stack() > 0 or torch.compiler.is_compiling():
        return label_B
    if label_B.is_cuda:
        torch._assert_async((label_B < num_classes).all(), f"label_B: expected {classes}")  # pyright: ignore[reportPrivateImportUsage]
        return torch.where(label_B < 0, num_classes, label_B)
    lowest, highest = (int(end) for end in label_B.aminmax())
    if highest >= num_classes:
        raise ValueError(f"label_B: expected {classes}, got {highest}")
    return torch.where(label_B < 0, num_classes, label_B) if lowest < 0 else label_B


def expect_own_blocks(model: Any) -> None:
    """Raise a ValueError if `model` is not patched and one of its blocks is."""
    if torch.compiler.is_compiling() or "actvar" in vars(model):
        return
    for index, block in enumerate(model.blocks):
        if hasattr(block, "actvar"):
            raise ValueError(
                f"expected the blocks of an unpatched model, but blocks[{index}] has the patch of another model, as in "
                "a shallow copy (copy.copy) of it: call actvar.remove_patch(var), which takes the patch off the block, "
                "then actvar.apply_patch(var, config) if this model is to have one; copy.deepcopy makes other blocks"
            )


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Keep other threads from using `model` while the context is open: its blocks hold the K/V cache of one sample.

    Raises:
        RuntimeError: another thread is in such a context of this model.
    """
    key, me = id(model), threading.get_ident()
    is_nested = _threads.get(key) == me
    try:
        if _threads.setdefault(key, me) != me:
            raise RuntimeError(
                f"this {type(model).__name__} is in use by another thread, and its blocks hold the K/V cache of one "
                "sample: give each thread a copy (copy.deepcopy), or let them take turns"
            )
        yield
    finally:  # no call here: after one, Ctrl-C could come in between
        if not is_nested and key in _threads and _threads[key] == me:
            del _threads[key]


def by_one_thread(method: Callable) -> Callable:
    """Let only one thread at a time run `method` of a model; errors are those of `one_thread`."""

    @functools.wraps(method)
    def alone(self, *args, **kwargs):
        with one_thread(self):
            return method(self, *args, **kwargs)

    return alone
