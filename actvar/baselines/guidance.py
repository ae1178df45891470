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
from actvar.models.sampling import sample_top_k_top_p
from actvar.models.var import Condition
from actvar.patching.patch import patched_silently


@contextmanager
def without_guidance(var: nn.Module, count: int) -> Iterator[nn.Module]:
    """The last `count` scales are drawn from the conditional rows alone, the only ones that are computed there.

    Not for `more_smooth`, which mixes codes instead of drawing them.

    Raises:
        TypeError: a model of another kind.
        ValueError: a count that leaves no scale with guidance.
    """
    first, family = expect_last_scales("count", count, expect_var(var)), family_of(var)
    condition: Condition | None = None

    def predict(self, scale, inputs, of_all):
        nonlocal condition
        if scale < first:
            return type(self).predict(self, scale, inputs, of_all)
        if scale == first:
            images = len(inputs)
            condition = Condition(*(rows[:images] for rows in of_all[:3]), of_all.position)
            for block in blocks_of(self):
                cache = family.cache(block)
                cache.write(*(cached[:images] for cached in cache.read()))
        return type(self).predict(self, scale, inputs, condition)

    def draw(self, logits, guidance, top_k, top_p, rng, scale):
        if scale < first:
            return type(self).draw(self, logits, guidance, top_k, top_p, rng, scale)
        return sample_top_k_top_p(logits.float(), top_k, top_p, rng)

    with patched_silently(var, DENSE, None), with_methods(var, predict=predict, draw=draw):
        yield var
