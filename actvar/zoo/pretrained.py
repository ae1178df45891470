"""Models that come with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from actvar.execution import Execution
from actvar.models import VAR, VQVAE
from actvar.models.checkpoint import load_var
from actvar.patching.patch import load_adapter
from actvar.zoo.checksums import checked
from actvar.zoo.fashion_mnist.features import FeatureNet

_FASHION_MNIST = Path(__file__).parent / "fashion_mnist" / "weights"
WEIGHTS = {"fashion-mnist": _FASHION_MNIST, "fashion-mnist-small": _FASHION_MNIST / "small"}
"""Folder of each model; the first one also has the autoencoder and the feature network of both."""


def load_pretrained(
    name: str,
    adapter: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: Execution | None = None,
) -> tuple[VQVAE, VAR]:
    """Load `(vae, var)` of a bundled model, offline.

    Args:
        name: `"fashion-mnist"`: ten classes of clothes, images `[B, 1, 32, 32]`; `"fashion-mnist-small"`: the same
            token maps from a smaller transformer.
        adapter: a bundled adapter such as `"paper"`, with which `var` is patched; None for the dense model.
        device: of both models.
        dtype: of both models' weights, see `load_var`.
        execution: how the patched model is run; None for the one that the adapter recommends, otherwise the default.

    Raises:
        ValueError: an unknown model or adapter, with those that exist; or an Execution without an adapter.
        CheckpointError: a file that is not the one that was shipped (`actvar.zoo.checksums`).
    """
    if adapter is None and execution is not None:
        raise ValueError(
            "execution: expected an adapter with it; for the dense model use actvar.accelerate(var, execution)"
        )
    var_file = checked(weights_folder(name) / "var.safetensors")
    vae_file = checked(WEIGHTS["fashion-mnist"] / "vae.safetensors")
    vae, var = load_var(var_file, vae_file, device=device, dtype=dtype)
    if adapter is not None:
        load_adapter(var, adapter_path(name, adapter), execution)
    return vae, var


def load_feature_network() -> FeatureNet:
    """Load the frozen CNN that judges the bundled models' images, in eval mode.

    Raises:
        CheckpointError: its file is not the one that was shipped.
    """
    network = FeatureNet()
    network.load_state_dict(load_file(checked(WEIGHTS["fashion-mnist"] / "features.safetensors")))
    return network.eval().requires_grad_(False)


def adapter_path(name: str, adapter: str) -> Path:
    """Return the file of a bundled adapter.

    Raises:
        ValueError: there is no adapter of that name; lists those that exist.
        CheckpointError: the file is not the one that was shipped.
    """
    folder = weights_folder(name)
    path = folder / f"adapter-{adapter}.safetensors"
    if not path.is_file():
        raise ValueError(f"adapter: {name} comes with {bundled_adapters(name)}, got {adapter!r}")
    return checked(path)


def bundled_adapters(name: str) -> list[str]:
    """Return the names of the adapters that a bundled model comes with."""
    return sorted(path.stem.removeprefix("adapter-") for path in weights_folder(name).glob("adapter-*.safetensors"))


def bundled_baselines(name: str) -> dict[str, Path]:
    """Return the files of the trained baselines that a bundled model comes with, by name.

    These files are adapters, but `actvar evaluate` samples by them in its own way, and `bundled_adapters` omits them.

    Raises:
        CheckpointError: one is not the file that was shipped.
    """
    paths = sorted(weights_folder(name).glob("baseline-*.safetensors"))
    return {path.stem.removeprefix("baseline-"): checked(path) for path in paths}


def weights_folder(name: str) -> Path:
    """Return the folder of a bundled model, or raise a ValueError that lists those that exist."""
    if name not in WEIGHTS:
        raise ValueError(f"model: expected one of {sorted(WEIGHTS)}, got {name!r}")
    return WEIGHTS[name]
