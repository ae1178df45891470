"""Skip the last scales: the image is decoded from the token maps so far.

Source: the last step of Guo et al., FastVAR, ICCV 2025. Nothing is trained, though the autoencoder expects all token
maps.
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
def skip_last_scales(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """End sampling before the last `count` scales.

    Args:
        model: the dense model, a VAR or an Infinity.
        count: number of scales, from 1 to one less than the model has.

    Raises:
        TypeError: a model of another kind.
        ValueError: a count that leaves no scale; an Infinity raises it in sampling, where the schedule is known.
    """
    expect_last_scales("count", count, expect_own_model(model))
    with patched_silently(model, replace(DENSE, scales_until=-count), None):
        yield model
