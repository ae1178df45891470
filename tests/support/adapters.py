"""Change adapter files, and check that a model refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from actvar import ActVARConfig, AdapterError, load_adapter
from actvar.models import VAR
from actvar.patching.adapter import gate_parameters

CONFIG = ActVARConfig(token_rates=(0.5, 0.75), ffn_rate=0.5, num_experts=8)


def rewritten(path: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    """Write the adapter at `path` again with other tensors or metadata; return the path."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) if tensors is None else tensors, path, {**old, **metadata})
    return path


def assert_refused(var: VAR, path: Path, message: str) -> None:
    """Check that `var` refuses the adapter at `path` with an error like `message`, and keeps its gates."""
    before = _gates(var)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(var, path)
    assert path.name in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in _gates(var).items())


def _gates(var: VAR) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in gate_parameters(var).items()}
