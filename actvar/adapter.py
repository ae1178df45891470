"""Adapter files: selectors and routers in safetensors, the configuration as JSON in the metadata."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from actvar.config import ActVARConfig
from actvar.families import unwrapped
from actvar.files import replacing
from actvar.recording import shared_state

logger = logging.getLogger(__name__)

FORMAT = "actvar-adapter"
VERSION = "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdapterError(ValueError):
    """An adapter file that cannot be read, or does not fit the model; the model is unchanged."""


def save_adapter(var: nn.Module, path: str | Path) -> None:
    """Write selectors and routers of a patched model, under a temporary name first.

    Tensors `blocks.<i>.selector.weight` `[1, C]`, `.selector.bias` `[1]`, `.router.weight` `[N, C]`, `.router.bias`
    `[N]` in their own dtype; metadata: format, version, the model's sizes, the configuration.

    Raises:
        ValueError: the model is not patched, or its selectors and routers have values that are not finite.
        OSError: the file cannot be written; an older one is as it was.
    """
    var = unwrapped(var)
    config = shared_state(var).config
    for name, parameter in gate_parameters(var).items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got some that are not; nothing was written to {path}")
    metadata = {"format": FORMAT, "version": VERSION, "model": json.dumps(_sizes(var)), "config": config.to_json()}
    tensors = {name: parameter.detach().contiguous() for name, parameter in gate_parameters(var).items()}
    try:
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


@torch.no_grad()
def load_adapter(var: nn.Module, path: str | Path) -> nn.Module:
    """Load selectors and routers into a patched model; returns `var`. Everything is checked before anything changes.

    The adapter must have been made for the model's sizes and number of experts. Other rates, scales or K/V mode than
    it was trained for are allowed, with a logged warning.

    Raises:
        FileNotFoundError: no such file.
        AdapterError: not an adapter, or one for another model; names the file, what was expected and what came.
        ValueError: the model is not patched.
    """
    model = unwrapped(var)
    config = shared_state(model).config
    metadata, tensors = _read(Path(path))
    if metadata["model"] != _sizes(model):
        raise AdapterError(f"{path}: made for a model with {metadata['model']}, this one has {_sizes(model)}")
    trained = metadata["config"]
    if trained.num_experts != config.num_experts:
        raise AdapterError(
            f"{path}: made for num_experts={trained.num_experts}, the model is patched with "
            f"{config.num_experts}; patch it with ActVARConfig(num_experts={trained.num_experts})"
        )
    parameters = gate_parameters(model)
    if tensors.keys() != parameters.keys():
        differing = sorted(tensors.keys() ^ parameters.keys())
        raise AdapterError(f"{path}: expected the tensors of {len(model.blocks)} blocks, differing: {differing[:4]}")
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise AdapterError(f"{path}: {name}: expected shape {list(parameter.shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{path}: {name}: expected floating-point values of {DTYPES}, got {tensor.dtype}")
        tensors[name] = tensor.to(parameter.dtype)
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{path}: {name}: expected finite values in {parameter.dtype}")
    if replace(trained, expert_schedule=config.expert_schedule, sampler=config.sampler) != config:
        logger.warning("%s was trained with %s and is used with %s", path, trained, config)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    except BaseException:
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
        raise
    return var


def read_adapter_config(path: str | Path) -> ActVARConfig:
    """The configuration an adapter was trained with: `apply_patch(var, read_adapter_config(path))`.

    Raises:
        FileNotFoundError, AdapterError: as `load_adapter`.
    """
    return _read(Path(path))[0]["config"]


def describe_adapter(path: str | Path) -> dict[str, object]:
    """Model sizes, configuration, parameter count and dtypes of an adapter file; errors as in `load_adapter`."""
    metadata, tensors = _read(Path(path))
    return {
        "kind": "adapter",
        **metadata["model"],
        "config": metadata["config"],
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
    }


def gate_parameters(var: nn.Module) -> dict[str, nn.Parameter]:
    """Selector and router parameters of a patched model by their name in an adapter file."""
    return {
        f"blocks.{index}.{gate}.{name}": parameter
        for index, block in enumerate(var.blocks)
        for gate in ("selector", "router")
        for name, parameter in getattr(block.actvar, gate).named_parameters()
    }


def _sizes(var: nn.Module) -> dict[str, object]:
    fc1 = var.blocks[0].ffn.fc1
    return {
        "depth": len(var.blocks),
        "width": fc1.in_features,
        "hidden": fc1.out_features,
        "patch_nums": list(var.patch_nums),
    }


def _read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of any kind, since the header is untrusted
        raise AdapterError(f"{path}: expected a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise AdapterError(f"{path}: expected an ActVAR adapter ({FORMAT!r} version {VERSION!r}), got {found}")
    try:
        parsed = {"model": _sizes_from(metadata["model"]), "config": ActVARConfig.from_json(metadata["config"])}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: its metadata is damaged: {error}") from error
    return parsed, tensors


def _sizes_from(text: str) -> dict[str, object]:
    """The model's sizes as `_sizes` gives them, from JSON."""
    sizes = json.loads(text)
    if not isinstance(sizes, dict) or sorted(sizes) != ["depth", "hidden", "patch_nums", "width"]:
        raise ValueError(f"expected the sizes of a model, got {text[:200]!r}")
    sides = sizes["patch_nums"] if isinstance(sizes["patch_nums"], list) else [None]
    if not all(type(number) is int for number in (sizes["depth"], sizes["width"], sizes["hidden"], *sides)):
        raise ValueError(f"expected sizes that are integers, got {text[:200]!r}")
    return sizes
