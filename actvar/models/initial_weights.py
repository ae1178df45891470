"""Initialise layers that the models have in common."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def init_products(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the weights of all linear layers and embeddings from a truncated normal distribution; biases become 0.

    Args:
        model: the model.
        std: standard deviation of the weights.
        generator: all that the weights depend on.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, generator=generator)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()
