"""Weights that an adapter brings in place of the model's own, which are kept beside them for removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from actvar.utils.class_swap import restore_class, swap_class


class TunedModule(nn.Module):
    """Mixed into the class of a module some of whose own parameters are replaced; `self.originals` holds the model's.

    `parameters()` and the forward pass see the replaced ones, `state_dict` and `load_state_dict` the originals, and
    `.to`, `.half` and the like convert both.
    """

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
def _originals_in_place(module: TunedModule) -> Iterator[None]:
    tuned = {name: module._parameters[name] for name in module.originals}
    try:
        module._parameters.update(module.originals)
        yield
    finally:
        module.originals = {name: module._parameters[name] for name in tuned}
        module._parameters.update(tuned)


def replace_parameters(model: nn.Module, tuned: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in place of the model's own of the same names, which are kept; nothing is copied.

    Args:
        tuned: by names as in `model.state_dict()`, shapes, dtypes and devices as there. None may be replaced already.
    """
    for name, parameter in tuned.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, TunedModule):
            module.originals = {}
            swap_class(module, TunedModule)
        module.originals[leaf] = module._parameters[leaf]
        module._parameters[leaf] = parameter


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `replace_parameters` put into the model, by name."""
    return {
        f"{path}.{leaf}".replace("_orig_mod.", ""): module._parameters[leaf]
        for path, module in model.named_modules()
        if isinstance(module, TunedModule)
        for leaf in module.originals
    }


def restore_parameters(model: nn.Module) -> None:
    """Undo `replace_parameters`, also one that was interrupted: the model's own parameters are back, the same ones."""
    for module in model.modules():
        if "originals" in module.__dict__:
            module._parameters.update(module.originals)
            if isinstance(module, TunedModule):
                restore_class(module)
            del module.originals
