"""Guidance off in the last scales: the unconditional rows end there.

Source: Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models, 2024. Adapted: the interval is one of scales, not of noise levels, and begins with the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from actvar.baselines.replacing_methods import expect_last_scales, expect_var, with_methods
from actvar.config import DENSE
from actvar.families import blocks_of, family_of
from actvar.models.token_draw import sample_top_k_top_p
from actvar.models.var import Condition
from actvar.patching.patch import patched_silently


@contextmanager
def without_guidance(var: nn.Module, count: int) -> Iterator[nn.Module]:
    """Compute the conditional rows alone in the last `count` scales, and draw from these.

    Sampling with `more_smooth` is not changed so, since it mixes codes instead of drawing them.

    Args:
        var: the dense model.
        count: number of scales, from 1 to one less than the model has.

    Raises:
        TypeError: a model of another kind.
        ValueError: a count that leaves no scale with guidance.
    """
    first, family = expect_last_scales("count", count, expect_var(var)), family_of(var)
    condition: Condition

    def predict(self, scale, inputs, guided: Condition):
        nonlocal condition
        if scale < first:
            return type(self).predict(self, scale, inputs, guided)
        if scale == first:
            images = len(inputs)
            condition = Condition(
                guided.labels[:images], guided.embedded[:images], guided.modulation[:images], guided.position
            )
            for block in blocks_of(self):
                cache = family.cache(block)
                past = cache.read()
                if past is not None:
                    cache.write(*(rows[:images] for rows in past))
        return type(self).predict(self, scale, inputs, condition)

    def draw(self, logits, guidance, top_k, top_p, rng, scale):
        if scale < first:
            return type(self).draw(self, logits, guidance, top_k, top_p, rng, scale)
        return sample_top_k_top_p(logits.float(), top_k, top_p, rng)

    with patched_silently(var, DENSE, None), with_methods(var, predict=predict, draw=draw):
        yield var
