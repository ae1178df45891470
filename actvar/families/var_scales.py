"""Walk through the scales of a VAR: logits scale by scale, and where a scale is added to the image's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from actvar.models.var import VAR
from actvar.utils.wrappers import unwrapped


def logits_by_scale(model: Any, labels: Tensor, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield number and logits `[R, L, V]` of the scales that `model` samples, through the K/V cache.

    Args:
        model: a VAR of either class.
        labels: classes of all rows, `[R]` int64.
        inputs: `[B, L - first, Cvae]`, each for `R / B` rows.
    """
    scale_inputs = [None, *inputs.split([side * side for side in model.patch_nums[1:]], dim=1)]
    attentions = [unwrapped(block).attn for block in model.blocks]
    try:
        for attention in attentions:
            attention.kv_caching(True)
        yield from (own_logits if isinstance(model, VAR) else public_logits)(model, labels, scale_inputs)
    finally:
        for attention in attentions:
            attention.kv_caching(False)


def own_logits(model: VAR, labels: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """Yield number and logits of the scales that `model` samples, by its own methods, which a baseline may replace."""
    condition = model.condition(labels)
    for scale in model.scales():
        yield scale, model.predict(scale, inputs[scale], condition)


def public_logits(model: Any, labels: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """Yield number and logits of all scales of the public class, whose sampling loop is one method."""
    cond = model.class_emb(labels)
    modulation, position = model.shared_ada_lin(cond), model.lvl_embed(model.lvl_1L) + model.pos_1LC
    start = 0
    for scale, codes in enumerate(inputs):
        if codes is None:
            x = cond.unsqueeze(1) + model.pos_start
        else:
            x = model.word_embed(codes.to(model.word_embed.weight.dtype)).repeat(len(labels) // len(codes), 1, 1)
        x = x + position[:, start : start + x.shape[1]]
        start += x.shape[1]
        for block in model.blocks:
            x = block(x=x, cond_BD=modulation, attn_bias=None)
        yield scale, model.get_logits(x, cond)


def adding_method(quantizer: Any):
    """Return the quantizer's method that adds a scale to the features, and its name, ours or the public code's."""
    for name in ("add_scale", "get_next_autoregressive_input"):
        if hasattr(quantizer, name):
            return getattr(quantizer, name), name
    raise TypeError(f"expected the quantizer of a VAR, got {type(quantizer).__name__}")
