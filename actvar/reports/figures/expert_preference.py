"""Figure 5: which experts the tokens want, by step and by class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from torch import nn

from actvar.distill.losses import expert_distances, router_target
from actvar.families import blocks_of, family_of
from actvar.patching.patch import unpatched
from actvar.sampling.request import Sampling
from actvar.sparse.contexts import record
from actvar.sparse.state import patch_state
from actvar.utils.pictures import save_figure, save_table
from actvar.zoo import load_pretrained
from actvar.zoo.fashion_mnist.data import CLASSES

Shares = dict[int, np.ndarray]
"""Share by step, from 0, of the tokens that want each expert, `[blocks, classes, N]`; NaN where the FFN is dense."""


def figure5(folder: Path, adapter: str = "paper", per_class: int = 8) -> list[Path]:
    """Write `figure5.png` and `figure5.csv` (`chosen_by, step, block, class, expert, share`).

    The dense model wants the experts whose outputs are nearest to the FFN's (Eq. 4, 5), as many as are on at the last
    step. Its shares are at every step and over all classes. The router wants the experts that it chose, at the sparse
    steps, for the tokens that a block updated.

    Args:
        folder: of the files.
        adapter: of the bundled model.
        per_class: images drawn of each class.

    Returns:
        The files.
    """
    _, var = load_pretrained("fashion-mnist", adapter)
    sampling = Sampling(tuple(label for label in range(len(CLASSES)) for _ in range(per_class)))
    by_model, by_router = wanted_by_model(var, sampling), chosen_by_router(var, sampling)
    by_model = {step: shares.mean(axis=1, keepdims=True) for step, shares in by_model.items()}
    rows = [
        (chosen_by, step + 1, block + 1, classes[label], expert + 1, f"{share:.4f}")
        for chosen_by, by_step, classes in (("dense model", by_model, ["all"]), ("router", by_router, CLASSES))
        for step, shares in by_step.items()
        for (block, label, expert), share in np.ndenumerate(shares)
    ]
    columns = ("chosen_by", "step", "block", "class", "expert", "share")
    figure = _drawn(by_model, by_router, tuple(height for height, _ in family_of(var).maps(var)))
    return [save_figure(figure, folder / "figure5.png"), save_table(folder / "figure5.csv", columns, rows)]


@torch.no_grad()
def wanted_by_model(var: nn.Module, sampling: Sampling) -> Shares:
    """Return the shares of tokens that want each expert of a dense model.

    The model samples without its patch, but experts are counted in the patch's order of hidden units.

    Args:
        var: a patched model.
        sampling: the images to draw.
    """
    state, images = patch_state(var), len(sampling.labels)
    family, num_experts = family_of(var), state.config.num_experts
    weights: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for block in blocks_of(var):
        fc1_weight, fc1_bias, fc2_weight, _ = family.ffn_weights(block)
        weights.append((fc1_weight.clone(), fc1_bias.clone(), fc2_weight.clone()))
    with unpatched(var), _ffn_inputs(var) as inputs:
        sampling.run(var)
    shares = _nothing(var, sampling, range(len(family.maps(var))))
    for block, block_inputs in enumerate(inputs):
        active = state.schedules[block][-1].experts
        for step, u in enumerate(block_inputs):
            distances = expert_distances(u[:images].flatten(0, 1), *weights[block], num_experts)
            wanted = router_target(distances, active) > 0
            shares[step][block] = _by_class(wanted.view(images, -1, num_experts), sampling)
    return shares


def chosen_by_router(var: nn.Module, sampling: Sampling) -> Shares:
    """Return the shares of tokens for which the routers of a patched model chose each expert, at the sparse steps.

    Args:
        var: a patched model.
        sampling: the images to draw.
    """
    with record(var) as records:
        sampling.run(var)
    masks = [(r.scale.index, r.block, r.mask) for r in records if r.mask is not None]
    shares = _nothing(var, sampling, sorted({step for step, _, _ in masks}))
    for step, block, mask in masks:
        shares[step][block] = _by_class(mask[: len(sampling.labels)], sampling)  # the conditional rows
    return shares


@contextmanager
def _ffn_inputs(var: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """Collect the inputs `[R, L, C]` of every FFN of an unpatched model: for each block, one per step."""
    layers = [family_of(var).ffn_module(block) for block in blocks_of(var)]
    inputs: list[list[torch.Tensor]] = [[] for _ in layers]

    def keep(block: int, _ffn: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        inputs[block].append(arguments[0])

    handles = [ffn.register_forward_pre_hook(partial(keep, number)) for number, ffn in enumerate(layers)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _nothing(var: nn.Module, sampling: Sampling, steps: range | list[int]) -> Shares:
    """Return shares that are NaN everywhere."""
    shape = len(blocks_of(var)), len(set(sampling.labels)), patch_state(var).config.num_experts
    return {step: np.full(shape, np.nan) for step in steps}


def _by_class(wanted: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Return the shares `[classes, N]` of `wanted` `[images, tokens, N]` bool."""
    image_shares, labels = wanted.float().mean(dim=1).cpu().numpy(), np.array(sampling.labels)
    return np.stack([image_shares[labels == label].mean(axis=0) for label in sorted(set(sampling.labels))])


def _drawn(by_model: Shares, by_router: Shares, sides: tuple[int, ...]) -> Figure:
    """Draw a column per block, with a heat map by step, then one by class for each sparse step."""
    panels = [("best for the\ndense model", [f"{side}x{side}" for side in sides])]
    panels += [(f"chosen by the router,\n{sides[step]}x{sides[step]} tokens", list(CLASSES)) for step in by_router]
    tables = [np.concatenate(list(by_model.values()), axis=1), *by_router.values()]
    blocks, _, experts = tables[0].shape
    heights = [len(names) for _, names in panels]
    figure = Figure(figsize=(1.75 * blocks + 2.4, 0.2 * sum(heights) + 1.4), layout="constrained")
    rows = figure.subplots(len(panels), blocks, sharex=True, height_ratios=heights, squeeze=False)
    norm = CenteredNorm(float(np.nanmean(tables[-1])), 0.25)
    for row, (title, names), table in zip(rows, panels, tables, strict=True):
        for axes, block_shares in zip(row, table, strict=True):
            drawn = axes.imshow(block_shares, cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest")
            axes.set_yticks([])
        row[0].set_yticks(range(len(names)), names, fontsize=8)
        row[0].set_ylabel(title, fontsize=9)
    for block, (first, last) in enumerate(zip(rows[0], rows[-1], strict=True)):
        first.set_title(f"block {block + 1}", fontsize=10)
        last.set_xticks(range(0, experts, 5), range(1, experts + 1, 5))
        last.set_xlabel("expert")
    figure.colorbar(drawn, ax=rows, label="share of the tokens that want it", extend="both", shrink=0.6, pad=0.01)
    return figure
