"""Compute Infinity's logits by plain code, which the tests of its baselines compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from actvar.evaluate.text_predictions import ScaleBits
from actvar.models import Infinity
from actvar.models.infinity.layers import BlockContext
from actvar.models.infinity.schedules import tokens_of
from actvar.sampling.text_request import TextSampling


@torch.no_grad()
def oracle_logits(infinity: Infinity, sampling: TextSampling, bits: list[ScaleBits], update) -> list[Tensor]:
    """Return the guided logits `[B, N, 2]` by scale of plain code, along drawn bits.

    `update(block_index, scale, name, x, sublayer)` stands for `sublayer(x)`, the gated output of attention,
    cross-attention or FFN; `sublayer(rows, index)` is that of some rows. Keys and values are those of the rows that
    attention saw.
    """
    texts = [sampling.features[label] for label in sampling.labels]
    lengths = [len(text) for text in texts]
    text = torch.cat((*texts, infinity.unconditional(lengths)))
    condition, schedule = infinity.condition(text, lengths * 2), sampling.schedule
    maps = [infinity.as_bits(b.drawn.view(len(texts), *size, -1)) for b, (_, *size) in zip(bits, schedule, strict=True)]
    inputs = [None, *infinity.teacher_input(maps).split(tokens_of(schedule)[1:], dim=1)]
    found, caches, start = [], [None] * infinity.depth, 0
    for scale, tokens in enumerate(tokens_of(schedule)):
        x = infinity.embedded(scale, inputs[scale], condition)
        angles = infinity.angles(schedule)[:, start : start + tokens]
        start += tokens
        context = BlockContext(condition.modulation, condition.text, angles, scale)
        for number, block in enumerate(infinity.unregistered_blocks):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = (block.ada_gss + context.modulation).unbind(2)

            def attention(
                rows, index=None, block=block, number=number, context=context, parts=(gamma1, scale1, shift1)
            ):
                gate, widening, shift = parts
                block.sa.kv_caching(True)
                if caches[number] is not None:
                    block.sa.cached_k, block.sa.cached_v = caches[number]
                out = block.sa(block.norm(rows) * (1 + widening) + shift, context, index) * gate
                caches[number] = block.sa.cached_k, block.sa.cached_v
                block.sa.kv_caching(False)
                return out

            def between(rows, index=None, block=block, context=context):
                norm = block.ca_norm
                return block.ca(F.layer_norm(rows, (block.C,), norm.weight, norm.bias, 1e-6), context.text)

            def ffn(rows, index=None, block=block, parts=(gamma2, scale2, shift2)):
                gate, widening, shift = parts
                return block.ffn(block.norm(rows) * (1 + widening) + shift) * gate

            for name, sublayer in (("attention", attention), ("between", between), ("ffn", ffn)):
                x = x + update(number, scale, name, x, sublayer)
        logits = infinity.get_logits(x, condition.pooled) / sampling.tau
        text_rows, other = logits.chunk(2)
        found.append((sampling.cfg * text_rows + (1 - sampling.cfg) * other).view(len(texts), -1, 2))
    return found
