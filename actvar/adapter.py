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
from actvar.gates import set_order
from actvar.recording import shared_state

logger = logging.getLogger(__name__)

FORMAT = "actvar-adapter"
VERSION = "1"


class AdapterError(ValueError):
    """An adapter file that cannot be read, or does not fit the model; the model is unchanged."""


def save_adapter(var: nn.Module, path: str | Path) -> None:
    """Write selectors and routers of a patched model, under a temporary name first.

    Tensors `blocks.<i>.selector.weight` `[1, C]`, `.selector.bias` `[1]`, `.router.weight` `[N, C]`, `.router.bias`
    `[N]` in their own dtype, and where hidden units were reordered for the experts `.order` `[D]` int32; metadata:
    format, version, the model's sizes, the configuration.

    Raises:
        ValueError: the model is not patched.
    """
    var = unwrapped(var)
    config = shared_state(var).config
    metadata = {"format": FORMAT, "version": VERSION, "model": json.dumps(_sizes(var)), "config": config.to_json()}
    tensors = {name: parameter.detach().contiguous() for name, parameter in gate_parameters(var).items()}
    for index, block in enumerate(var.blocks):
        if block.actvar.order is not None:
            tensors[f"blocks.{index}.order"] = block.actvar.order.int().contiguous()
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata)


@torch.no_grad()
def load_adapter(var: nn.Module, path: str | Path) -> nn.Module:
    """Load selectors and routers into a patched model, and bring the FFN's hidden units into the adapter's order, in
    place (`remove_patch` takes them back); returns `var`. Everything is checked before anything changes.

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
    orders = [tensors.pop(f"blocks.{index}.order", None) for index in range(len(model.blocks))]
    _check_orders(path, model, orders)
    parameters = gate_parameters(model)
    if tensors.keys() != parameters.keys():
        differing = sorted(tensors.keys() ^ parameters.keys())
        raise AdapterError(f"{path}: expected the tensors of {len(model.blocks)} blocks, differing: {differing[:4]}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise AdapterError(
                f"{path}: {name}: expected shape {list(parameter.shape)}, got {list(tensors[name].shape)}"
            )
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            raise AdapterError(f"{path}: {name}: expected finite floating-point values")
    if replace(trained, expert_schedule=config.expert_schedule, sampler=config.sampler) != config:
        logger.warning("%s was trained with %s and is used with %s", path, trained, config)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
    for block, order in zip(model.blocks, orders, strict=True):
        set_order(unwrapped(block), order)
    return var


def _check_orders(path: str | Path, model: nn.Module, orders: list[torch.Tensor | None]) -> None:
    for index, (block, order) in enumerate(zip(model.blocks, orders, strict=True)):
        if order is None:
            continue
        hidden = block.ffn.fc1.out_features
        if order.shape != (hidden,) or order.is_floating_point():
            found = f"shape {list(order.shape)} in {order.dtype}"
            raise AdapterError(f"{path}: blocks.{index}.order: expected {hidden} integers, got {found}")
        if not torch.equal(order.long().sort().values, torch.arange(hidden)):
            raise AdapterError(f"{path}: blocks.{index}.order: expected each of 0 ... {hidden - 1} once")
        if block.ffn.fc1.weight.is_inference():
            raise AdapterError(
                f"{path}: it reorders hidden units, which weights made under torch.inference_mode do not allow; build "
                "or load the model outside of it"
            )


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
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
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
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: expected a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise AdapterError(f"{path}: expected an ActVAR adapter ({FORMAT!r} version {VERSION!r}), got {found}")
    try:
        parsed = {"model": json.loads(metadata["model"]), "config": ActVARConfig.from_json(metadata["config"])}
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(f"{path}: its metadata is damaged: {error}") from error
    return parsed, tensors
