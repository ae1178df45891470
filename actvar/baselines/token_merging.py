"""ToMe: at the last scales similar tokens are merged before attention and FFN, and get the same output after it.

Source: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.

Adapted: the destination of a window is its top left token, not one at random, so that an image repeats. Windows of odd
maps are cut off at the edge. Merged tokens give one key and value to the K/V cache. One matching serves attention and
FFN of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from actvar.baselines.replacing_methods import expect_var, with_forwards
from actvar.baselines.sublayers import Sublayers, rows_of, scale_at
from actvar.config import DENSE
from actvar.families import blocks_of
from actvar.patching.patch import patched_silently


@contextmanager
def token_merging(var: nn.Module, rate: float, scales: Sequence[int] = (-2, -1)) -> Iterator[nn.Module]:
    """Let every block at `scales` merge its tokens to the `rate` of them before attention and FFN.

    Args:
        var: the dense model.
        rate: share of the tokens that are left, above 0 and at most 1.
        scales: numbers of scales, counted from the end where negative.

    Raises:
        TypeError: a model of another kind.
        ValueError: a rate or scales that do not fit the model, or a rate that leaves less than one token per 2x2
            window.
    """
    expect_var(var)
    config = replace(DENSE, scales=tuple(scales), token_rates=(rate,) * len(scales), ffn_rate=(1.0,) * len(scales))

    def forward_of(block: Any):
        for scale in block.actvar.schedule:
            fewest = len(destinations(scale.height, scale.width))
            if scale.keep < fewest:
                raise ValueError(f"rate: {scale.tokens} tokens can be merged to {fewest}, got a rate of {rate}")

        def forward(self, *args, **kwargs):
            call = self.actvar.family.block_call(*args, **kwargs)
            x, scale = call.x, scale_at(self, call)
            if not scale.select:
                return type(self).forward(self, *args, **kwargs)
            layers, matching = Sublayers(self, call, scale), Matching(x, scale.keep, (scale.height, scale.width))
            x = x + matching.unmerge(layers.attention(x, matching.merge))
            return x + matching.unmerge(layers.ffn(x, matching.merge))

        return forward

    with patched_silently(var, config, None), with_forwards(blocks_of(var), forward_of):
        yield var


def destinations(height: int, width: int) -> torch.Tensor:
    """Return the indices of the top left token of every 2x2 window of a map, int64."""
    return torch.arange(height * width, device="cpu").view(height, width)[::2, ::2].flatten()


class Matching:
    """The pairing of the `L - keep` tokens of each row that are most like a destination with that destination.

    Every 2x2 window has one destination, and tokens are compared by the cosine.

    Args:
        x: tokens of a map, `[R, L, C]`.
        keep: tokens of a row that are left.
        size: height and width of the map.
    """

    def __init__(self, x: torch.Tensor, keep: int, size: tuple[int, int]):
        R, L, _ = x.shape
        to = destinations(*size).to(x.device)
        is_source = torch.ones(L, dtype=torch.bool, device=x.device)
        is_source[to] = False
        sources = is_source.nonzero().flatten()
        unit = F.normalize(x, dim=-1)
        likeness, nearest = (unit[:, sources] @ unit[:, to].transpose(1, 2)).max(dim=-1)
        order = likeness.argsort(dim=1, descending=True)
        left = sources[order[:, L - keep :]]
        kept = torch.cat((to.expand(R, -1), left), dim=1)
        position = torch.zeros(R, L, dtype=torch.int64, device=x.device)
        position.scatter_(1, kept, torch.arange(keep, device=x.device).expand(R, -1))
        merged = order[:, : L - keep]
        self.position = position.scatter_(1, sources[merged], nearest.gather(1, merged))
        belongs = torch.zeros(R, keep, L, dtype=x.dtype, device=x.device).scatter_(1, self.position.unsqueeze(1), 1.0)
        self.shares = belongs / belongs.sum(dim=2, keepdim=True)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Return the means `[R, keep, C]` of the tokens of `x` `[R, L, C]` that are merged into one."""
        return self.shares @ x

    def unmerge(self, rows: torch.Tensor) -> torch.Tensor:
        """Return for every token the one of `rows` `[R, keep, C]` that it was merged into, `[R, L, C]`."""
        return rows_of(rows, self.position)
