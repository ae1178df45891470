"""Look through modules that wrap another one without changing its result."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
"""Names under which `torch.compile` and activation checkpointing keep the module that they wrap."""


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has in a model without the wrappers inside it."""
    return ".".join(part for part in name.split(".") if part not in _INNER)


def unwrapped(module: Any) -> Any:
    """Return the module inside the wrappers of `torch.compile`, activation checkpointing and data parallelism.

    An object that is no `nn.Module` is returned as it is. Both are annotated `Any`, as models are in `actvar.families`.
    """
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in _INNER if name in module._modules), None)
        if inner is None and isinstance(module, DistributedDataParallel | DataParallel):
            inner = module.module
        if inner is None:
            break
        module = inner
    return module
