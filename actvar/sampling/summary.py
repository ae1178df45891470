"""Say in a few lines how a model samples: tokens, experts and guidance by scale, dtypes, FLOPs, what is not fused."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from torch import nn

from actvar.families import family_of
from actvar.flops import model_flops, total_flops
from actvar.sparse.called_layers import called_parts
from actvar.sparse.schedule import Scale
from actvar.sparse.state import PatchState, is_patched, patch_state
from actvar.utils.wrappers import unwrapped
from actvar_kernels.backend import get_backend
from actvar_kernels.constants import FORMATS


def summary(var: nn.Module) -> str:
    """Return lines of text that say how a model samples.

    They name what each scale leaves out, dtypes, the sampler, the backend, the FLOPs that are saved, on a GPU whether
    samples are CUDA graphs, and the parts that are called instead of fused.

    Args:
        var: a VAR, patched or not, which may be inside a wrapper.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: the blocks of a patched model are not those that were patched.
    """
    model = unwrapped(var)
    family_of(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not is_patched(model):
        return f"dense, by PyTorch; weights {dtype}"
    state = patch_state(model)
    maps = [(scale.height, scale.width) for scale in state.schedule]  # of the last sample, where each has its own
    configs = (state.config.without_savings(), None)
    dense, own = (total_flops(model_flops(model, 1, config, maps)) for config in configs)
    left_out = ", without attention to the text" if state.family.has_between else ""
    execution = state.execution
    lines = [
        *_by_scale(state),
        f"weights {dtype}, decoder {execution.decoder_dtype or 'as it is'}, sampler {execution.sampler}, "
        f"backend {get_backend()}",
        *_formats(state),
        *state.graphs.described(model, execution.cuda_graph),
        f"FLOPs of the transformer: {own / 1e9:.2f} G an image, {1 - own / dense:.1%} saved{left_out}",
    ]
    not_fused = called_parts(state.called, state.head_called)
    if not_fused:
        lines.append(f"not fused: {'; '.join(not_fused)}")
    return "\n".join(lines)


def _formats(state: PatchState) -> Iterator[str]:
    """Yield a line about the blocks that multiply in each format of eight bits, if there are any."""
    for name, dtype in FORMATS.items():
        count = state.quantized.count(dtype)
        if count:
            share = "the" if count == len(state.quantized) else f"{count} of {len(state.quantized)}"
            yield f"products of {share} blocks in {name}"


def _by_scale(state: PatchState) -> Iterator[str]:
    """Yield a line for every scale that leaves anything out, or one line if none does."""
    changed = False
    for scales in zip(*state.schedules, strict=True):
        parts = list(_left_out(scales, state.config.num_experts))
        if parts:
            changed = True
            yield f"{scales[0].height}x{scales[0].width}: {', '.join(parts)}"
    if not changed:
        yield "all tokens, experts and rows at every scale"


def _left_out(scales: tuple[Scale, ...], num_experts: int) -> Iterator[str]:
    """Yield what one scale leaves out, the mean over the blocks."""
    if scales[0].left_out:
        yield "left out"
        return
    if any(scale.select for scale in scales):
        yield f"{statistics.fmean(scale.keep / scale.tokens for scale in scales):.0%} of the tokens"
    if any(scale.route or scale.static for scale in scales):
        same = " for every token" if any(scale.static for scale in scales) else ""
        yield f"{statistics.fmean(scale.experts for scale in scales):.3g} of {num_experts} experts{same}"
    if not scales[0].guided:
        yield "no guidance"
