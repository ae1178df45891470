"""Hold what a sample of a patched model depends on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """Hold what a sample by the fast sampler depends on.

    Attributes:
        labels: classes `[B]` int64, negative for none.
        seeds: the seed of the batch, `[1]` int64, or of every image, `[B]` int64.
        cfg, top_k, top_p: as in `VAR.autoregressive_infer_cfg`.
    """

    labels: Tensor
    seeds: Tensor
    cfg: float
    top_k: int
    top_p: float
