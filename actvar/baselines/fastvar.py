"""FastVAR: at late scales only pivotal tokens are computed, the others get what an earlier scale had there.

Source: Guo et al., FastVAR: Linear Visual Autoregressive Modeling via Cached Token Pruning, ICCV 2025, and its code,
github.com/csguoh/FastVAR at 34cdd65: `Infinity/infinity/models/fastvar_utils.py`, `fastvar_basic.py`, `infinity.py`.

Taken over: the score, one choice of tokens per sublayer, the first and last blocks left whole, stand-ins for the other
tokens, positions of the chosen tokens, and keys and values of pivotal tokens alone. On Infinity `PUBLIC_INFINITY` is
what that code does to square images of 1024x1024 pixels. It prunes 0.4 of the tokens at 32x32 and half of them at
40x40, in blocks 3 to 27 of 32. The stand-ins are those of 24x24. It leaves out 48x48 and 64x64.

Adapted: scales are named by number, where the authors' code names widths of square maps, and does nothing on others.
The share of whole blocks is that of 32 blocks, where the code names their numbers for every depth. On VAR, for which
the authors have no code, the last blocks are not whole, and there is no cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from actvar.baselines.replacing_methods import expect_own_model, with_forwards
from actvar.baselines.sublayers import Sublayers, flat, rows_of, scale_at
from actvar.config import DENSE
from actvar.families import blocks_of, family_of
from actvar.models import VAR
from actvar.patching.patch import patched_silently
from actvar.sparse.schedule import Scale
from actvar_kernels.checks import as_items

FIRST_BLOCKS = 0.1
"""Share of VAR's blocks, from the first on, that compute all tokens."""
PUBLIC_INFINITY = {"rate": (615 / 1024, 0.5), "scales": (-4, -3), "left_out": 2}
"""Arguments of `fastvar` for what the authors' code does on Infinity; of 1,024 tokens it keeps 615."""


@contextmanager
def fastvar(
    model: nn.Module, rate: float | Sequence[float], scales: Sequence[int] = (-2, -1), left_out: int = 0
) -> Iterator[nn.Module]:
    """Let each layer of a block at `scales` compute only the `rate` of tokens with the largest `|x - mean(x)|^2`.

    The layers are attention, cross-attention where there is one, and FFN. In place of the other tokens' outputs stand
    those of the scale before `scales`, interpolated by area.

    Args:
        model: the dense model, a VAR or an Infinity.
        rate: share of the tokens that are computed, above 0 and at most 1; one number, or one for each of `scales`.
        scales: numbers of scales, counted from the end where negative.
        left_out: number of the last scales that are not sampled.

    Raises:
        TypeError: a model of another kind.
        ValueError: rates, scales or a number of left out scales that do not fit the model, or no scale before them. An
            Infinity raises it in sampling, where the schedule is known.
    """
    expect_own_model(model)
    blocks = blocks_of(model)
    _source(scales, len(family_of(model).maps(model)))
    first, last = _whole_blocks(model, len(blocks))
    rates = as_items(rate) or (rate,) * len(scales)
    config = replace(
        DENSE,
        scales=tuple(scales),
        token_rates=tuple((1.0,) * first + (r,) * (len(blocks) - first - last) + (1.0,) * last for r in rates),
        ffn_rate=(1.0,) * len(scales),
        scales_until=-left_out if left_out else None,
    )

    def forward_of(block: nn.Module):
        kept: dict[str, torch.Tensor] = {}

        def forward(self, *args, **kwargs):
            call, schedule = self.actvar.family.block_call(*args, **kwargs), self.actvar.schedule
            x, scale = call.x, scale_at(self, call)
            source = schedule[_source(scales, len(schedule))]
            is_source = scale.index == source.index
            if not any(each.select for each in schedule) or not (scale.select or is_source):
                return type(self).forward(self, *args, **kwargs)
            if scale.index == 0:
                self.actvar.shared.begin_block(self.actvar.block_index, self)
            for name, sublayer in Sublayers(self, call, scale).by_name().items():
                if is_source:
                    kept[name] = sublayer(x)
                    x = x + kept[name]
                else:
                    x = x + _with_stand_ins(x, sublayer, kept[name], source, scale)
            return x

        return forward

    with patched_silently(model, config, None), with_forwards(blocks, forward_of):
        yield model


def _with_stand_ins(
    x: torch.Tensor, sublayer: Callable[..., torch.Tensor], kept: torch.Tensor, source: Scale, scale: Scale
) -> torch.Tensor:
    """Return what a layer adds to rows `x` `[R, L, C]`, computed for the pivotal ones.

    Args:
        x: rows of the residual stream.
        sublayer: the layer, called with some rows and their index.
        kept: what the layer added at the scale `source`, `[R, l, C]`.
        source, scale: the scale that the stand-ins are from, and the one of `x`.
    """
    index = pivotal_tokens(x, scale.keep)
    output = interpolated(kept, (source.height, source.width), (scale.height, scale.width))
    update = sublayer(rows_of(x, index), index=index).flatten(0, 1)
    output.flatten(0, 1).index_copy_(0, flat(index, scale.tokens), update)
    return output


def pivotal_tokens(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the indices `[R, keep]` int64 of the tokens of `x` `[R, L, C]` with the largest `|x - mean(x)|^2`."""
    return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=-1).topk(keep, dim=1).indices


def interpolated(rows: torch.Tensor, before: tuple[int, int], after: tuple[int, int]) -> torch.Tensor:
    """Return a map `[R, l, C]` of height and width `before` as one of `after`, by area."""
    maps = rows.transpose(1, 2).unflatten(2, before)
    return F.interpolate(maps, size=after, mode="area").flatten(2).transpose(1, 2).contiguous()


def _whole_blocks(model: nn.Module, count: int) -> tuple[int, int]:
    """Return how many of `count` blocks compute all tokens, from the first on and up to the last."""
    if isinstance(model, VAR):
        return math.ceil(FIRST_BLOCKS * count), 0
    return 3 * count // 32, 4 * count // 32


def _source(scales: Sequence[int], count: int) -> int:
    """Return the number of the scale before `scales`, of a model with `count` scales."""
    if not all(-count <= scale < count for scale in scales):
        raise ValueError(f"scales: the model has {count} scales, got {tuple(scales)}")
    source = min(range(count)[scale] for scale in scales) - 1
    if source < 0:
        raise ValueError(f"scales: expected a scale before them, from which outputs are kept, got {tuple(scales)}")
    return source
