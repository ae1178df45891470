"""Models that come with the package."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, overload

import torch
from safetensors.torch import load_file

from actvar.execution import Execution
from actvar.models import VAR, VQVAE, Infinity
from actvar.models.checkpoint import load_infinity, load_var
from actvar.models.infinity import InfinityTokenizer
from actvar.patching.patch import accelerate, load_adapter
from actvar.text.words import WordEncoder, load_words
from actvar.zoo.checksums import checked
from actvar.zoo.fashion_mnist.features import FeatureNet

_FASHION_MNIST = Path(__file__).parent / "fashion_mnist" / "weights"
TEXT_MODEL = "fashion-mnist-text"
"""The model that draws images of texts, an Infinity."""
WEIGHTS = {
    "fashion-mnist": _FASHION_MNIST,
    "fashion-mnist-small": _FASHION_MNIST / "small",
    TEXT_MODEL: Path(__file__).parent / "fashion_mnist_text" / "weights",
}
"""Folder of each model; the first one also has the autoencoder of the second, and the feature network of all."""
LOSSLESS = "lossless"
"""The preset without a file, which is `accelerate`."""


@overload
def load_pretrained(
    name: Literal["fashion-mnist-text"],
    adapter: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: Execution | None = None,
    preset: str | None = None,
) -> tuple[InfinityTokenizer, Infinity]: ...


@overload
def load_pretrained(
    name: str,
    adapter: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: Execution | None = None,
    preset: str | None = None,
) -> tuple[VQVAE, VAR]: ...


def load_pretrained(
    name: str,
    adapter: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: Execution | None = None,
    preset: str | None = None,
) -> tuple[VQVAE, VAR] | tuple[InfinityTokenizer, Infinity]:
    """Load `(vae, var)` of a bundled model, or `(tokenizer, infinity)` of the one of texts, offline.

    Without an adapter and a preset the transformer is the dense model, unpatched.

    Args:
        name: `"fashion-mnist"`: ten classes of clothes, images `[B, 1, 32, 32]`; `"fashion-mnist-small"`: the same
            token maps from a smaller transformer; `"fashion-mnist-text"`: clothes from texts, images `[B, 3, 32, 32]`
            of one and `[B, 3, 32, 64]` of two, whose prompts `load_text_encoder` encodes.
        adapter: a bundled adapter such as `"paper"`, with which the model is patched; None for no adapter.
        device: of both models.
        dtype: of both models' weights, see `load_var`; for the model of texts see `load_infinity`.
        execution: how the patched model is run; None for the one that the adapter or preset recommends, otherwise the
            default.
        preset: a bundled preset such as `"near"`, with which the model is patched in place of an adapter; `"lossless"`
            is `actvar.accelerate`. None for no preset.

    Raises:
        ValueError: an unknown model, adapter or preset, with those that exist; an adapter and a preset together; or an
            Execution without either.
        CheckpointError: a file that is not the one that was shipped (`actvar.zoo.checksums`).
    """
    if adapter is not None and preset is not None:
        raise ValueError(f"preset: expected an adapter or a preset, got both, {adapter!r} and {preset!r}")
    if adapter is None and preset is None and execution is not None:
        raise ValueError(
            "execution: expected an adapter or a preset with it; for the dense model use preset='lossless', or "
            "actvar.accelerate(var, execution)"
        )
    if preset is not None:
        patch_file = preset_path(name, preset)
    else:
        patch_file = None if adapter is None else adapter_path(name, adapter)
    load = load_infinity if name == TEXT_MODEL else load_var
    loaded = load(*checkpoints(name), device=device, dtype=dtype)
    if patch_file is not None:
        load_adapter(loaded[1], patch_file, execution)
    elif preset is not None:
        accelerate(loaded[1], execution)
    return loaded


def load_text_encoder(device: str | torch.device = "cpu") -> WordEncoder:
    """Load the word vectors by which the bundled model of texts reads prompts; it is called as a `TextEncoder` is.

    Args:
        device: device of the features.

    Raises:
        CheckpointError: the file is not the one that was shipped.
    """
    return load_words(checked(weights_folder(TEXT_MODEL) / "words.safetensors"), device)


def checkpoints(name: str) -> tuple[Path, Path]:
    """Return the files of a bundled model: of its transformer, and of its autoencoder or tokenizer.

    Raises:
        ValueError: an unknown model.
        CheckpointError: a file that is not the one that was shipped.
    """
    folder = weights_folder(name)
    if name == TEXT_MODEL:
        return checked(folder / "infinity.safetensors"), checked(folder / "tokenizer.safetensors")
    return checked(folder / "var.safetensors"), checked(WEIGHTS["fashion-mnist"] / "vae.safetensors")


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
    files = _files(name, "adapter")
    _expect_known(name, "adapter", adapter, files)
    return checked(files[adapter])


def preset_path(name: str, preset: str) -> Path | None:
    """Return the adapter file of a bundled preset, or None for `lossless`, which has no file.

    Raises:
        ValueError: there is no preset of that name; lists those that exist.
        CheckpointError: the file is not the one that was shipped.
    """
    _expect_known(name, "preset", preset, bundled_presets(name))
    return None if preset == LOSSLESS else checked(_files(name, "preset")[preset])


def bundled_adapters(name: str) -> list[str]:
    """Return the names of the adapters that a bundled model comes with."""
    return list(_files(name, "adapter"))


def bundled_presets(name: str) -> list[str]:
    """Return the names of a bundled model's presets: `lossless`, then those that have files.

    A preset's file is an adapter that is named by its quality, and `bundled_adapters` omits it.
    """
    return [LOSSLESS, *_files(name, "preset")]


def bundled_baselines(name: str) -> dict[str, Path]:
    """Return the files of the trained baselines that a bundled model comes with, by name.

    These files are adapters, but `actvar evaluate` samples by them in its own way, and `bundled_adapters` omits them.

    Raises:
        CheckpointError: one is not the file that was shipped.
    """
    return {baseline: checked(path) for baseline, path in _files(name, "baseline").items()}


def weights_folder(name: str) -> Path:
    """Return the folder of a bundled model, or raise a ValueError that lists those that exist."""
    if name not in WEIGHTS:
        raise ValueError(f"model: expected one of {sorted(WEIGHTS)}, got {name!r}")
    return WEIGHTS[name]


def _files(name: str, kind: str) -> dict[str, Path]:
    """Return the files of a kind, such as `adapter`, that a bundled model comes with, by name in order."""
    paths = weights_folder(name).glob(f"{kind}-*.safetensors")
    return {path.stem.removeprefix(f"{kind}-"): path for path in sorted(paths, key=lambda path: path.stem)}


def _expect_known(name: str, kind: str, wanted: str, known: Collection[str]) -> None:
    """Raise a ValueError unless `wanted` is among the names that a bundled model has of a kind."""
    if wanted not in known:
        raise ValueError(f"{kind}: {name} comes with {list(known)}, got {wanted!r}")
