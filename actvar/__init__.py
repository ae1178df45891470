"""ActVAR: dynamic activation of weights and tokens for pretrained VAR image generators."""

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.models.checkpoint import CheckpointError, load_var
from actvar.patching.adapter import AdapterError, read_adapter_config, save_adapter
from actvar.patching.patch import accelerate, apply_patch, load_adapter, patched, refresh, release_cache, remove_patch
from actvar.sampling.cuda_graph import GraphedSampling
from actvar.sparse.state import guided_rows, record
from actvar.zoo import load_pretrained

__version__ = "0.1.0"

__all__ = [
    "ActVARConfig",
    "AdapterError",
    "CheckpointError",
    "Execution",
    "GraphedSampling",
    "accelerate",
    "apply_patch",
    "guided_rows",
    "load_adapter",
    "load_pretrained",
    "load_var",
    "patched",
    "read_adapter_config",
    "record",
    "refresh",
    "release_cache",
    "remove_patch",
    "save_adapter",
]
