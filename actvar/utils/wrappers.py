"""Modules that wrap another one without changing what it computes."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_INNER = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where `torch.compile` and activation checkpointing keep the module that they wrap."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, activation checkpointing and data parallelism."""
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in _INNER if name in module._modules), None)
        if inner is None and isinstance(module, DistributedDataParallel | DataParallel):
            inner = module.module
        if inner is None:
            break
        module = inner
    return module
