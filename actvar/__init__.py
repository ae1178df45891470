"""ActVAR: dynamic activation of weights and tokens for pretrained VAR image generators.

Names are imported when they are first used, so that `actvar --help` does not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actvar.config import ActVARConfig
    from actvar.execution import Execution
    from actvar.families.conditions import Texts
    from actvar.models.checkpoint import CheckpointError, load_infinity, load_var
    from actvar.patching.adapter import AdapterError, read_adapter_config, save_adapter
    from actvar.patching.patch import (
        accelerate,
        apply_patch,
        load_adapter,
        patched,
        refresh,
        release_cache,
        remove_patch,
    )
    from actvar.sampling.cuda_graph import GraphedSampling
    from actvar.sampling.sampler import Sampler
    from actvar.sampling.summary import summary
    from actvar.sparse.contexts import guided_rows, record
    from actvar.text import TextEncoder
    from actvar.zoo import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "ActVARConfig",
    "AdapterError",
    "CheckpointError",
    "Execution",
    "GraphedSampling",
    "Sampler",
    "TextEncoder",
    "Texts",
    "accelerate",
    "apply_patch",
    "guided_rows",
    "load_adapter",
    "load_infinity",
    "load_pretrained",
    "load_var",
    "patched",
    "read_adapter_config",
    "record",
    "refresh",
    "release_cache",
    "remove_patch",
    "save_adapter",
    "summary",
]

_MODULES = {
    "config": ["ActVARConfig"],
    "execution": ["Execution"],
    "families.conditions": ["Texts"],
    "models.checkpoint": ["CheckpointError", "load_infinity", "load_var"],
    "patching.adapter": ["AdapterError", "read_adapter_config", "save_adapter"],
    "patching.patch": [
        "accelerate",
        "apply_patch",
        "load_adapter",
        "patched",
        "refresh",
        "release_cache",
        "remove_patch",
    ],
    "sampling.summary": ["summary"],
    "sampling.cuda_graph": ["GraphedSampling"],
    "sampling.sampler": ["Sampler"],
    "sparse.contexts": ["guided_rows", "record"],
    "text": ["TextEncoder"],
    "zoo": ["load_pretrained"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name, or a module of this package such as `actvar.models`, on its first use."""
    if name in _MODULE_OF:
        globals()[name] = getattr(import_module(f"actvar.{_MODULE_OF[name]}"), name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"actvar.{name}"):
        return import_module(f"actvar.{name}")
    raise AttributeError(f"module 'actvar' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names beside those that are there, for completion."""
    return sorted({*globals(), *__all__})
