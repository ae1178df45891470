"""Fixtures that several modules of this folder read: checkpoints, adapters, a stand-in for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapters import CONFIG
from support.checkpoint_files import Tensors, tiny_pair, write
from support.graph_card import Card, stand_in

from actvar import apply_patch, save_adapter
from actvar.models import VAR
from actvar.patching.adapter import gate_parameters


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensors, Tensors]:
    """Return state dicts `(vae, var)` of a tiny pair; tests copy the dicts before they change them."""
    vae, var = tiny_pair()
    return vae.state_dict(), var.state_dict()


@pytest.fixture
def files(tmp_path: Path, tensors: tuple[Tensors, Tensors]) -> tuple[Path, Path]:
    """Write a good `(vae.pth, var.pth)`."""
    return write(tensors[0], tmp_path / "vae.pth"), write(tensors[1], tmp_path / "var.pth")


@pytest.fixture
def trained(make_var: Callable[..., VAR]) -> VAR:
    """Return a model patched under `CONFIG` whose gates are not the initial ones."""
    var = apply_patch(make_var(), CONFIG)
    generator = torch.Generator().manual_seed(5)
    for parameter in gate_parameters(var).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return var


@pytest.fixture
def adapter(trained: VAR, tmp_path: Path) -> Path:
    """Write the adapter of `trained`."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(trained, path)
    return path


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Let graphs of samples be captured on a CPU."""
    return stand_in(monkeypatch)
