"""FastVAR: at the last scales only pivotal tokens are computed, the others get what an earlier scale had there.

Source: Guo et al., FastVAR: Linear Visual Autoregressive Modeling via Cached Token Pruning, ICCV 2025.

Taken over: the score, one choice of tokens per sublayer, the first blocks left whole, and the stand-ins for other ones.
Adapted: the authors have code for Infinity and HART; here it is for class-conditional VAR, without cross-attention. The
rate is the same at all `scales`; the authors' rate falls from scale to scale, and is 0 at the last ones
(`skip_last_scales`). Keys and values are those of pivotal tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from actvar.baselines.replacing_methods import expect_var, with_forwards
from actvar.baselines.sublayers import Sublayers, flat, rows_of, scale_at
from actvar.config import DENSE
from actvar.families import blocks_of, family_of
from actvar.patching.patch import patched_silently

FIRST_BLOCKS = 0.1
"""Share of the blocks, from the first on, that compute all tokens; in the authors' code these are 3 of 32."""


@contextmanager
def fastvar(var: nn.Module, rate: float, scales: Sequence[int] = (-2, -1)) -> Iterator[nn.Module]:
    """Let attention and FFN at `scales` each compute only the `rate` of tokens with the largest `|x - mean(x)|^2`.

    In place of the other tokens' outputs stand those of the scale before `scales`, interpolated by area.

    Args:
        var: the dense model.
        rate: share of the tokens that are computed, above 0 and at most 1.
        scales: numbers of scales, counted from the end where negative.

    Raises:
        TypeError: a model of another kind.
        ValueError: a rate or scales that do not fit the model, or no scale before them.
    """
    expect_var(var)
    blocks, maps = blocks_of(var), family_of(var).maps(var)
    chosen = [range(len(maps))[scale] for scale in scales]
    source = min(chosen) - 1
    if source < 0:
        raise ValueError(f"scales: expected a scale before them, from which outputs are kept, got {tuple(scales)}")
    dense_blocks = math.ceil(FIRST_BLOCKS * len(blocks))
    rates = (1.0,) * dense_blocks + (rate,) * (len(blocks) - dense_blocks)
    config = replace(DENSE, scales=tuple(scales), token_rates=(rates,) * len(scales), ffn_rate=(1.0,) * len(scales))

    def forward_of(block: nn.Module):
        kept: dict[str, torch.Tensor] = {}

        def forward(self, *args, **kwargs):
            call = self.actvar.family.block_call(*args, **kwargs)
            x, scale = call.x, scale_at(self, call)
            if scale.index != source and not scale.select:
                return type(self).forward(self, *args, **kwargs)
            layers = Sublayers(self, call, scale)
            for name, sublayer in (("attention", layers.attention), ("ffn", layers.ffn)):
                if scale.index == source:
                    kept[name] = sublayer(x)
                    x = x + kept[name]
                else:
                    index = pivotal_tokens(x, scale.keep)
                    output = interpolated(kept[name], maps[source], maps[scale.index])
                    update = sublayer(rows_of(x, index)).flatten(0, 1)
                    output.flatten(0, 1).index_copy_(0, flat(index, scale.tokens), update)
                    x = x + output
            return x

        return forward

    with patched_silently(var, config, None), with_forwards(blocks, forward_of):
        yield var


def pivotal_tokens(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the indices `[R, keep]` int64 of the tokens of `x` `[R, L, C]` with the largest `|x - mean(x)|^2`."""
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1).topk(keep, dim=1).indices


def interpolated(rows: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """Return a map `[R, l, C]` of height and width `before` as one of `after`, by area."""
    maps = rows.transpose(1, 2).unflatten(2, before)
    return F.interpolate(maps, size=after, mode="area").flatten(2).transpose(1, 2).contiguous()
