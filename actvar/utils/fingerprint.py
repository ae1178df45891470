"""Identify tensors and models by a hash of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(*modules: nn.Module) -> str:
    """Return the `fingerprint` of all parameters and buffers of `modules`, gates included."""
    return fingerprint(pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers()))
