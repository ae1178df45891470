"""An adapter without training: fitted in closed form to token maps that the dense model draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from actvar.calibrate.fit import HELD_OUT, BlockFit, fit_block
from actvar.calibrate.rates import expect_budget, rates_under_budget
from actvar.calibrate.report import Report, report_of
from actvar.calibrate.sensitivity import divergence_per_block
from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families import blocks_of, family_of
from actvar.families.base import BlockCall
from actvar.families.conditions import Batch, Conditions, Texts
from actvar.models.arguments import SEEDS, checked_finite, checked_integer
from actvar.patching.patch import patch_silently, reconfigure, remove_patch
from actvar.sampling.token_maps import sampled_inputs, spread
from actvar.sparse.block_state import set_order_and_gates
from actvar.sparse.schedule import Scale, build_schedule
from actvar.sparse.state import patch_state
from actvar.utils.progress import progress
from actvar.utils.wrappers import unwrapped

BATCH, TOKENS = 8, 16384
"""The most samples of a batch, and tokens, unless one sample has more."""


@torch.no_grad()
def calibrate(
    var: nn.Module,
    config: ActVARConfig | None = None,
    *,
    images: int = 16,
    seed: int = 0,
    cfg: float | None = None,
    texts: Texts | None = None,
    uniform: bool = False,
    cluster: bool = True,
    execution: Execution | None = None,
) -> Report:
    """Patch `var` with selectors and routers fitted without data or gradients; `save_adapter` writes them.

    The dense model samples token maps. Then each block gets the dense residual stream. Its hidden units are clustered
    into experts, and its selector and router are fitted by ridge regression (`fit_block`). The losses of every rate are
    measured on every fourth batch, which is not fitted to. Besides the model, three residual streams of the samples
    take memory, `2 * images * L * C` numbers each.

    Args:
        var: a VAR or an Infinity in eval mode; a patch that it has is removed.
        config: the rates whose FLOPs are the budget, the number of experts and other variants.
        images: samples, at least 4; each gives a row with and one without its class, as under guidance.
        seed: of the first batch of samples.
        cfg: guidance strength of the samples; None for 1.5, and for 4 of a model that draws from texts.
        texts: what a model that draws from texts is fitted to; None for classes.
        uniform: use the rates of `config` in every block instead of the best ones under its budget.
        cluster: experts of hidden units that matter for the same tokens, instead of contiguous ones.
        execution: how the patched model is run; None for the default.

    Returns:
        How much the fitted selectors and routers keep.

    Raises:
        TypeError: a model of an unsupported kind, an argument that is no number, or no texts for a model of texts.
        ValueError: a configuration or Execution that does not fit the model, rates of 1, or a budget that is too low.
        ValueError: fewer than 4 images, a seed or cfg out of its range, or a model in train mode.
    """
    model = unwrapped(var)
    config = ActVARConfig() if config is None else config
    twin = family_of(model).drawing_twin(model)
    if twin is not None:
        patch_silently(model, config, execution)
        remove_patch(model)
        report = calibrate(
            twin, config, images=images, seed=seed, cfg=cfg, texts=texts, uniform=uniform, cluster=cluster
        )
        move_patch(twin, model, execution)
        return report
    images = checked_integer("images", images, HELD_OUT)
    seed = checked_integer("seed", seed, SEEDS[0], SEEDS[-1] - images)  # every batch takes the next seed
    cfg = family_of(model).default_cfg if cfg is None else checked_finite("cfg", cfg)
    if model.training:
        raise ValueError("expected a model in eval mode: call var.eval()")
    if not config.is_sparse:
        raise ValueError("expected a rate below 1 at some scale: there is no selector or router to fit")
    if config.static_experts:
        raise ValueError("static_experts: expected False, as a router is fitted; make a plan with the lever static")
    if config.num_blocks is not None and not uniform:
        raise ValueError("expected one rate per scale as the budget, got one per block")
    patch_silently(model, config, execution)
    remove_patch(model)
    drawn = spread(model, images, seed, texts)
    if not uniform:
        expect_budget(model, config, drawn)

    batches = samples_to_fit(model, images, seed, cfg, texts)
    fits = patch_with_fits(model, config, execution, batches, cluster)
    curves = [fit.curves for fit in fits]
    chosen = config
    if not uniform:
        sensitivity = divergence_per_block(model, config, *held_out_samples(batches))
        chosen = rates_under_budget(model, config, drawn, curves, sensitivity)
        reconfigure(model, chosen)
    return report_of(model, config, chosen, drawn, curves)


def samples_to_fit(model: nn.Module, images: int, seed: int, cfg: float, texts: Texts | None = None) -> list[Batch]:
    """Return samples of the dense model in batches of equal size, as many images as `calibrate` is told to use."""
    maps = family_of(model).maps_of(model, spread(model, images, seed, texts))
    most = min(BATCH, images // HELD_OUT, TOKENS // sum(height * width for height, width in maps))
    return sampled_inputs(model, images, max(1, most), seed, cfg, texts)


def held_out_samples(batches: list[Batch]) -> Batch:
    """Return those samples, an eighth of all, by which the divergences of blocks are measured."""
    conditions, inputs = batches[-1]
    count = max(1, sum(len(of) for of, _ in batches) // 8)
    return conditions[-count:], inputs[-count:]


def patch_with_fits(
    model: nn.Module, config: ActVARConfig, execution: Execution | None, batches: list[Batch], cluster: bool = True
) -> list[BlockFit]:
    """Fit all blocks of a dense model to `batches`, and patch the model with the results, which are returned."""
    fits = fits_of(model, config, batches, cluster)
    patch_with(model, config, execution, fits)
    return fits


def fits_of(model: nn.Module, config: ActVARConfig, batches: list[Batch], cluster: bool = True) -> list[BlockFit]:
    """Return the fits of all blocks of a dense model to `batches`."""
    family = family_of(model)
    rows: list[Any] = [None] * len(batches)
    fits: list[BlockFit] = []
    scales = _active_scales(config, family.maps_of(model, batches[0][0]))
    for block in progress(blocks_of(model), desc="blocks"):
        stream = [functools.partial(_call, model, *batch, x) for batch, x in zip(batches, rows, strict=True)]
        fit = fit_block(family, block, stream, scales, config.num_experts, cluster)
        rows = fit.after
        fits.append(fit._replace(after=[]))
    return fits


def patch_with(model: nn.Module, config: ActVARConfig, execution: Execution | None, fits: list[BlockFit]) -> None:
    """Patch a dense model with selectors, routers and orders of hidden units from `fits_of`."""
    patch_silently(model, config, execution)
    blocks: list[Any] = blocks_of(model)
    for block, fit in zip(blocks, fits, strict=True):
        gates = block.actvar
        values = {
            gates.selector.weight: fit.selector,
            gates.router.weight: fit.router[0],
            gates.router.bias: fit.router[1],
        }
        set_order_and_gates(block, fit.order_for(config), values)


@torch.no_grad()
def move_patch(source: nn.Module, target: nn.Module, execution: Execution | None) -> None:
    """Take the patch off `source`, and give the same to `target`, a model of another class with the same weights."""
    config = patch_state(source).config
    blocks = patch_state(source).blocks(source)
    gates = [(block.actvar.hidden_order.clone(), [gate.clone() for gate in _gates(block)]) for block in blocks]
    remove_patch(source)
    patch_silently(target, config, execution)
    for block, (order, values) in zip(patch_state(target).blocks(target), gates, strict=True):
        set_order_and_gates(block, order, dict(zip(_gates(block), values, strict=True)))


def _gates(block: Any) -> list[nn.Parameter]:
    """Return the parameters of a patched block's selector and router."""
    return [*block.actvar.selector.parameters(), *block.actvar.router.parameters()]


def _active_scales(config: ActVARConfig, maps: Sequence[tuple[int, int]]) -> list[Scale]:
    """Return every scale of the configuration, whatever its rates."""
    return [scale for scale in build_schedule(replace(config, always_sparse=True), maps) if scale.active]


def _call(model: nn.Module, conditions: Conditions, inputs: torch.Tensor, x: torch.Tensor | None) -> BlockCall:
    """Return the call of a block for a batch with and without its conditions, whose masks are made anew.

    Args:
        model: the model.
        conditions, inputs: the batch.
        x: the residual stream in front of the block, `[2B, L, C]`; None for the first block.
    """
    family = family_of(model)
    call = family.embedded(model, family.with_unconditional(model, conditions), inputs.repeat(2, 1, 1)).call
    return call if x is None else call._replace(x=x)
