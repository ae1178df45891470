"""Put an adapter's weights in place of the model's own, which are kept beside them for removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from actvar.utils.class_swap import restore_class, swap_class
from actvar.utils.low_rank import Factors
from actvar.utils.wrappers import without_wrappers


class TunedModule(nn.Module):
    """Run a module with some of its parameters replaced; goes in front of the module's class.

    `self.originals` holds the model's own parameters by name. `parameters()` and the forward pass see the new ones,
    `state_dict` and `load_state_dict` the originals. Conversions such as `.to` and `.half` apply to both.

    `self.factors` holds the low-rank factors by whose product a new parameter differs from the original, by its name.
    Nothing converts them.
    """

    originals: dict[str, nn.Parameter | None]
    factors: dict[str, Factors]

    def _save_to_state_dict(self, *args):
        with _originals_in_place(self):
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args):
        with _originals_in_place(self):
            super()._load_from_state_dict(*args)

    def _apply(self, fn, recurse=True):
        with _originals_in_place(self):
            super()._apply(fn, recurse=False)
        return super()._apply(fn, recurse)


@contextmanager
def own_weights(model: nn.Module) -> Iterator[None]:
    """Let `model`, or a part of one, run with its own weights while the context is open."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, TunedModule):
                stack.enter_context(_originals_in_place(module))
        yield


@contextmanager
def _originals_in_place(module: TunedModule) -> Iterator[None]:
    """Put the model's own parameters in place while the context is open."""
    tuned = {name: module._parameters[name] for name in module.originals}
    try:
        module._parameters.update(module.originals)
        yield
    finally:
        module.originals = {name: module._parameters[name] for name in tuned}
        module._parameters.update(tuned)


@contextmanager
def running_with(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `model` run with other tensors in place of replaced parameters while the context is open.

    Args:
        model: the model.
        weights: tensors, which may have a gradient of their own, by the name of a replaced parameter.
    """
    places = [(module._parameters, leaf, weights[name]) for name, module, leaf in _replaced(model) if name in weights]
    before = [parameters[leaf] for parameters, leaf, _ in places]
    try:
        for parameters, leaf, weight in places:
            parameters[leaf] = weight  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for (parameters, leaf, _), parameter in zip(places, before, strict=True):
            parameters[leaf] = parameter


def replace_parameters(
    model: nn.Module, tuned: Mapping[str, nn.Parameter], factors: Mapping[str, Factors] | None = None
) -> None:
    """Put parameters in place of the model's own of the same names, which are kept; nothing is copied.

    Args:
        model: the model.
        tuned: new parameters by their name in `model.state_dict()`, with the shape, dtype and device of the entry
            there. None of these names may be replaced already.
        factors: the low-rank factors of those new parameters that have any, by the same names.
    """
    for name, parameter in tuned.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if not isinstance(module, TunedModule):
            module.originals, module.factors = {}, {}
            swap_class(module, TunedModule)
        if factors and name in factors:
            module.factors[leaf] = factors[name]
        module.originals[leaf] = module._parameters[leaf]
        module._parameters[leaf] = parameter


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that `replace_parameters` put into the model, by their name in its `state_dict`."""
    return {name: module.get_parameter(leaf) for name, module, leaf in _replaced(model)}


def tuned_factors(model: nn.Module) -> dict[str, Factors]:
    """Return the low-rank factors that `replace_parameters` was given, by the name of their parameter."""
    return {name: module.factors[leaf] for name, module, leaf in _replaced(model) if leaf in module.factors}


def _replaced(model: nn.Module) -> Iterator[tuple[str, TunedModule, str]]:
    """Yield the name in `state_dict`, the module and the name there of every replaced parameter."""
    for path, module in model.named_modules():
        if isinstance(module, TunedModule):
            for leaf in module.originals:
                yield without_wrappers(f"{path}.{leaf}"), module, leaf


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's own parameters in whose place others are, by their name in the `state_dict` of `model`."""
    with own_weights(model):
        return tuned_parameters(model)


def restore_parameters(model: nn.Module) -> None:
    """Put the model's own parameters back, the same objects, also after an interrupted `replace_parameters`."""
    for module in model.modules():
        state = module.__dict__
        if "originals" in state or "factors" in state:
            module._parameters.update(state.get("originals", {}))
            if isinstance(module, TunedModule):
                restore_class(module)
            for name in ("originals", "factors"):
                state.pop(name, None)
