"""Fixtures, and the switch to the tests that need the public code."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.helpers import make_tiny_var
from torch import nn

import actvar_kernels
from actvar.models import VAR

pytest.register_assert_rewrite(
    "support.adapters", "support.baseline_oracle", "support.kernel_loops", "support.oracle_cases"
)

# An example may take long on a machine that is busy with other work.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

LOCAL = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}


def refuse_network(event: str, arguments: tuple) -> None:
    """Audit hook: a test that looks up another host or connects to it fails."""
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    host = arguments[0]
    if event == "socket.connect":
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None  # the name of a local socket
    if host not in LOCAL:
        raise RuntimeError(f"a test reaches for {host}: tests run without a network")


sys.addaudithook(refuse_network)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give slow tests half an hour, and deselect tests of public code unless a variable gives its folder: those marked
    public_var without `ACTVAR_PUBLIC_VAR`, those marked public_infinity without `ACTVAR_PUBLIC_INFINITY`."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))
    missing = [name for name in ("public_var", "public_infinity") if f"ACTVAR_{name.upper()}" not in os.environ]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in missing)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup() -> None:
    """Forget what earlier tests compiled: `torch.compile` refuses a function that it has compiled eight times."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def tiny_var() -> VAR:
    return make_tiny_var()


@pytest.fixture
def make_var() -> Callable[..., VAR]:
    return make_tiny_var


@pytest.fixture
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run PyTorch's reference, whatever the environment says."""
    monkeypatch.delenv("ACTVAR_BACKEND", raising=False)
    monkeypatch.setattr(actvar_kernels.backend, "_chosen", "reference")


@pytest.fixture
def compiled_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Name an empty cache and an empty folder for temporary files, and the compiler that everybody has."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache" / "actvar"


@pytest.fixture(scope="session")
def public_var_folder() -> Path:
    return Path(os.environ["ACTVAR_PUBLIC_VAR"])


@pytest.fixture(scope="session")
def public_infinity_folder() -> Path:
    return Path(os.environ["ACTVAR_PUBLIC_INFINITY"])


@pytest.fixture(scope="session")
def build_public(public_var_folder: Path) -> Iterator:
    """The public `build_vae_var`, which leaves torch's layers as they were: it lets them begin with any numbers."""
    layers = [nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm]
    layers += [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d]
    saved = [(layer, layer.__dict__.get("reset_parameters")) for layer in layers]
    sys.path.insert(0, str(public_var_folder))
    from models import build_vae_var

    def build(**sizes):
        try:
            return build_vae_var(**sizes)
        finally:
            for layer, method in saved:
                if method is None:
                    del layer.reset_parameters
                else:
                    layer.reset_parameters = method

    yield build
    sys.path.remove(str(public_var_folder))
