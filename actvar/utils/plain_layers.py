"""Tell the layers that kernels may read: plain ones, for which PyTorch would run only the known `forward`.

A kernel takes a layer's weight and computes the result of its `forward`. A layer that is more than its weight (LoRA,
hooks, parametrisations, quantised weights) has to be called instead.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from actvar.utils.class_swap import own_class
from actvar_kernels.situation import are_plain

_GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)


def is_plain(layer: nn.Module, *classes: type) -> bool:
    """Return whether the class of `layer` is one of `classes` and kernels may read the layer; see `why_called`."""
    return why_called(layer, *classes) is None


def why_called(layer: nn.Module, *classes: type) -> str | None:
    """Return why a layer must be called instead of read, or None where kernels may read it.

    Args:
        layer: the layer.
        classes: classes with a known forward. The layer must be exactly of one, since a subclass may do anything.
    """
    kind = own_class(layer)
    if kind not in classes:
        return f"is of {kind.__module__}.{kind.__qualname__}"
    return why_not_by_class(layer)


def why_not_by_class(layer: nn.Module) -> str | None:
    """Return why a layer of a known class must be called instead of read, or None where kernels may read it."""
    state = layer.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return "has forward hooks"
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return "has backward hooks"
    if "forward" in state:
        return "has a forward of its own"
    for hooks in _GLOBAL_HOOKS:
        # a FLOP counter's hooks only follow the names of modules, and it counts registered operators
        if hooks and not all(isinstance(getattr(h, "__self__", None), ModuleTracker) for h in hooks.values()):
            return "is watched by global module hooks"
    parameters = state["_parameters"]
    if not all(map(is_ordinary, (parameters.get(name, state.get(name)) for name in ("weight", "bias")))):
        return "has a weight of a tensor subclass"
    return None


def is_ordinary(tensor: torch.Tensor | None) -> bool:
    """Return whether a weight is None, a plain tensor, or a fake one, which stands for a plain one without values."""
    return are_plain(tensor) or isinstance(tensor, FakeTensor)
