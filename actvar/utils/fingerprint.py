"""By which tensors are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_fingerprint(*modules: nn.Module) -> str:
    """`fingerprint` of all parameters and buffers, gates included."""
    return fingerprint(pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers()))
