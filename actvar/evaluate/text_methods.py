"""All ways to sample from Infinity that are compared, by name."""

from __future__ import annotations

import functools
import logging

import torch

from actvar import baselines
from actvar.baselines.fastvar import PUBLIC_INFINITY
from actvar.baselines.skipvar import DECIDED_AFTER
from actvar.config import DENSE
from actvar.evaluate.methods import EIGHT_BITS, Method, adapter_method, by_name, preset_methods
from actvar.patching.patch import patched_silently, unpatched
from actvar.zoo.pretrained import adapter_path, bundled_adapters

logger = logging.getLogger(__name__)

RATES = (0.75, 0.5)
LEFT_OUT, UNGUIDED = (1, 2), (1, 2, 3)


def text_methods(
    scales: int, batch: int, model: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Method]:
    """Return all methods by name; those that do not fit are left out, with a logged warning.

    Args:
        scales: number of scales of the images, at least two.
        batch: images per batch.
        model: name of a bundled model, whose adapters and presets are methods too; None for another one.
        device: where it is.
    """
    found = [
        Method("dense", unpatched),
        Method("accelerated", lambda infinity: patched_silently(infinity, DENSE, None)),
    ]
    if model:
        found += [adapter_method(name, adapter_path(model, name)) for name in bundled_adapters(model)]
        found += preset_methods(model)
    before = min(scales + first for first in PUBLIC_INFINITY["scales"])
    if before > 0:
        found.append(Method("fastvar", functools.partial(baselines.fastvar, **PUBLIC_INFINITY)))
    else:
        logger.warning("fastvar is left out: expected at least %d scales, got %d", scales + 1 - before, scales)
    if scales > 2:
        found += [Method(f"fastvar@{rate}", functools.partial(baselines.fastvar, rate=rate)) for rate in RATES]
    for count in (count for count in LEFT_OUT if count < scales):
        found.append(Method(f"skip@{count}", functools.partial(baselines.skip_last_scales, count=count)))
    for count in (count for count in UNGUIDED if count < scales):
        found.append(Method(f"unguided@{count}", functools.partial(baselines.without_guidance, count=count)))
    if batch > 1:
        logger.warning("skipvar is left out: it decides image by image, expected a batch of 1, got %d", batch)
    elif scales + DECIDED_AFTER < 1:
        logger.warning("skipvar is left out: expected at least %d scales, got %d", 1 - DECIDED_AFTER, scales)
    else:
        found.append(Method("skipvar", baselines.skipvar))
    return by_name([*found, *EIGHT_BITS], device)
