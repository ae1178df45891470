"""Patch a model in place, and take the patch off again. Knows no model family."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from actvar.adapter import load_adapter
from actvar.block import ActVARBlock
from actvar.config import ActVARConfig
from actvar.families import family_of
from actvar.gates import Gates
from actvar.recording import Shared, guided_rows
from actvar.schedule import Scale, build_schedule

logger = logging.getLogger(__name__)


class ActVARModel(nn.Module):
    """Mixed into the class of a patched model, in front of it."""

    def autoregressive_infer_cfg(self, *args, **kwargs):
        with guided_rows(self):
            return super().autoregressive_infer_cfg(*args, **kwargs)


class _PatchedInstance:
    """Pickles and copies by the original class, since patched classes are made at run time."""

    def __reduce_ex__(self, protocol):
        return _bare_instance, (self.original_class, self.mixin), self.__dict__


@functools.cache
def _patched_class(original: type, mixin: type) -> type:
    """The one class that puts `mixin` in front of `original`."""
    attributes = {"original_class": original, "mixin": mixin, "__module__": original.__module__}
    return type(f"ActVAR{original.__name__}", (_PatchedInstance, mixin, original), attributes)


def _bare_instance(original: type, mixin: type) -> nn.Module:
    cls = _patched_class(original, mixin)
    return cls.__new__(cls)


def apply_patch(var: nn.Module, config: ActVARConfig | None = None) -> nn.Module:
    """Make the last scales of a VAR sparse, in place; returns `var`.

    The classes of `var` and its blocks are swapped for subclasses, and each block gets a selector and a router.
    Parameters and `state_dict` stay as they are. A model that is patched already is re-patched with fresh gates.

    Args:
        var: `actvar.models.VAR`, or an instance of the public VAR class; also inside `torch.compile`'s wrapper.
        config: the default is the paper's.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: a configuration that does not fit the model. The model is unchanged in both cases.
    """
    schedule = patch_silently(var, ActVARConfig() if config is None else config)
    if any(scale.active for scale in schedule):
        logger.warning("selectors and routers are untrained: load trained ones with actvar.load_adapter(var, path)")
    return var


def patch_silently(var: nn.Module, config: ActVARConfig) -> tuple[Scale, ...]:
    """`apply_patch` without the warning, for callers that load an adapter next; returns the schedule."""
    model = _unwrapped(var)
    family = family_of(model)
    if not isinstance(config, ActVARConfig):
        raise TypeError(f"config: expected an ActVARConfig, got {type(config).__name__}")
    schedule = build_schedule(config, model.patch_nums)
    if family.hidden_size(model) % config.num_experts:
        raise ValueError(
            f"num_experts: expected a divisor of the FFN's hidden size {family.hidden_size(model)}, "
            f"got {config.num_experts}"
        )
    remove_patch(model)
    shared = Shared(config, schedule)
    for index, block in enumerate(model.blocks):
        device = block.ffn.fc1.weight.device
        gates = Gates(family.width(model), config.num_experts, index, shared, device)
        block.actvar = gates.train(block.training)
        block.__class__ = _patched_class(type(block), ActVARBlock)
    model.actvar = shared
    model.__class__ = _patched_class(type(model), ActVARModel)
    return schedule


def remove_patch(var: nn.Module) -> nn.Module:
    """Undo `apply_patch`, bit for bit; returns `var`. An unpatched VAR is left as it is.

    Raises:
        TypeError: a model of an unsupported kind.
    """
    model = _unwrapped(var)
    family_of(model)
    if isinstance(model, _PatchedInstance):
        model.__class__ = type(model).original_class
        del model.actvar
    for block in model.blocks:
        if isinstance(block, _PatchedInstance):
            block.__class__ = type(block).original_class
            del block.actvar
    return var


@contextmanager
def patched(
    var: nn.Module, config: ActVARConfig | None = None, adapter: str | Path | None = None
) -> Iterator[nn.Module]:
    """`apply_patch` (and `load_adapter`, if one is given) for the duration of the context."""
    if adapter is None:
        apply_patch(var, config)
    else:
        patch_silently(var, ActVARConfig() if config is None else config)
    try:
        if adapter is not None:
            load_adapter(var, adapter)
        yield var
    finally:
        remove_patch(var)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)
