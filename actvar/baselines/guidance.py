"""Guidance off in the last scales: the unconditional rows end there.

Source: Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
Diffusion Models, 2024. Adapted: the interval is one of scales, not of noise levels, and begins with the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from actvar.baselines.replacing_methods import expect_last_scales, expect_own_model
from actvar.config import DENSE
from actvar.patching.patch import patched_silently


@contextmanager
def without_guidance(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """Compute the conditional rows alone in the last `count` scales, and draw from these.

    Args:
        model: the dense model, a VAR or an Infinity.
        count: number of scales, from 1 to one less than the model has.

    Raises:
        TypeError: a model of another kind.
        ValueError: a count that leaves no scale with guidance; an Infinity raises it in sampling, where the schedule
            is known.
    """
    expect_last_scales("count", count, expect_own_model(model))
    with patched_silently(model, replace(DENSE, guidance_until=-count), None):
        yield model
