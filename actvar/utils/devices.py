"""Tell the device that a model lies on."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter of `module`."""
    return next(module.parameters()).device


def is_on_gpu(module: nn.Module) -> bool:
    """Return whether `module` is on a GPU."""
    return device_of(module).type == "cuda"
