"""Tell the device that a model lies on."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter of `module`."""
    return next(module.parameters()).device
