"""Read and write adapter files: gates and changed weights in safetensors, configuration and Execution as metadata.

`actvar.patching.patch.load_adapter` loads them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import FIELDS_ONCE_IN_CONFIG, Execution, checked_execution
from actvar.families import family_of
from actvar.patching.adapter_tensors import (
    DTYPES,
    FACTORS,
    WEIGHTS,
    AdapterError,
    check_factors,
    check_orders,
    checked,
    checked_factors,
    factor_tensors,
    merged_weights,
    rank_of,
)
from actvar.patching.hub import adapter_file
from actvar.sparse.block_state import set_order_and_gates
from actvar.sparse.state import patch_state
from actvar.utils.fields import json_object
from actvar.utils.files import replacing
from actvar.utils.low_rank import Factors
from actvar.utils.modes import no_grad
from actvar.utils.weight_override import replace_parameters, restore_parameters, tuned_factors, tuned_parameters
from actvar.utils.wrappers import unwrapped
from actvar_kernels.checks import as_integer

logger = logging.getLogger(__name__)

FORMAT = "actvar-adapter"
VERSION = "1"


def save_adapter(
    var: nn.Module,
    path: str | Path,
    training: Mapping[str, object] | None = None,
    execution: Execution | None = None,
) -> None:
    """Write selectors, routers and changed weights of a patched model to an adapter file.

    Block number i has the tensors `blocks.<i>.selector.weight` `[1, C]`, `.selector.bias` `[1]`, `.router.weight`
    `[N, C]` and `.router.bias` `[N]`. It also has `.order` `[D]` int32 where hidden units were reordered for the
    experts. Each changed weight is `weights.<name>`, where `<name>` is that of the model's `state_dict`. A weight that
    low-rank factors change is `factors.<name>.A` `[rank, inputs]` and `factors.<name>.B` `[outputs, rank]` instead, and
    a loaded file's factors are written as they were. Hidden units lie in the order of the experts. All tensors but
    `.order` and factors have the dtype of the parameter.

    Metadata has the format, its version, the model's sizes, the configuration, `training`, the factors' `rank` and
    `execution`.

    Args:
        var: a patched model.
        path: the file to write, under a temporary name until it is complete.
        training: how the adapter was made, JSON-compatible; `describe_adapter` shows it.
        execution: the Execution that is recommended to those who load the adapter; None recommends none.

    Raises:
        TypeError: `execution` is no Execution.
        ValueError: the model is not patched, or a tensor has values that are not finite.
        OSError: the file cannot be written; an older file is as it was.
    """
    var = unwrapped(var)
    state = patch_state(var)
    config = state.config
    metadata = {"format": FORMAT, "version": VERSION, "model": json.dumps(_sizes(var)), "config": config.to_json()}
    metadata["training"] = json.dumps(dict(training or {}))
    if execution is not None:
        metadata["execution"] = checked_execution(execution).to_json()
    factors = tuned_factors(var)
    if factors:
        metadata["rank"] = json.dumps(rank_of(factors))
    weights = {WEIGHTS + name: weight for name, weight in tuned_parameters(var).items() if name not in factors}
    parameters = gate_parameters(var) | weights | factor_tensors(factors)
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got some that are not; nothing was written to {path}")
    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    for index, block in enumerate(state.blocks(var)):
        order = block.actvar.changed_order
        if order is not None:
            tensors[f"blocks.{index}.order"] = order.int().contiguous()
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata)


class Adapter(NamedTuple):
    """Hold the content of an adapter file.

    Args:
        path: the file.
        sizes: the sizes of the model that the adapter was made for, by `Family.recorded_sizes`.
        config: the configuration of the patch when the file was saved.
        execution: how to run the model: the argument of `read_adapter`, otherwise the file's recommendation, otherwise
            the default.
        training: how the adapter was made.
        rank: of the factors of changed weights; None without factors.
        tensors: all tensors of the file by name, as `save_adapter` describes them.
    """

    path: Path
    sizes: Mapping[str, object]
    config: ActVARConfig
    execution: Execution
    training: object
    rank: int | None
    tensors: dict[str, torch.Tensor]

    def expect_made_for(self, model: nn.Module) -> None:
        """Raise AdapterError unless the adapter was made for the sizes of `model`."""
        if self.sizes != _sizes(model):
            raise AdapterError(f"{self.path}: made for a model with {self.sizes}, this one has {_sizes(model)}")


@no_grad
def put_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Bring an adapter and its Execution into a patched model. Any exception leaves the model unchanged.

    Args:
        model: a patched model, without wrappers.
        adapter: the adapter.

    Raises:
        AdapterError: the adapter does not fit the model; the message names the file, what was expected and what came.
        ValueError: the model is not patched, or its blocks are not those that were patched.
    """
    state, path, tensors = patch_state(model), adapter.path, dict(adapter.tensors)
    config, blocks = state.config, state.blocks(model)
    adapter.expect_made_for(model)
    if adapter.config.num_experts != config.num_experts:
        raise AdapterError(
            f"{path}: made for num_experts={adapter.config.num_experts}, the model is patched with "
            f"{config.num_experts}; patch it with ActVARConfig(num_experts={adapter.config.num_experts})"
        )
    orders = [tensors.pop(f"blocks.{index}.order", None) for index in range(len(blocks))]
    check_orders(path, state.family.sizes(model).hidden, orders)
    gates = gate_parameters(model)
    missing = sorted(gates.keys() - tensors.keys())
    if missing:
        raise AdapterError(f"{path}: expected the gates of {len(blocks)} blocks, missing: {missing[:4]}")
    parameters = {name: model.get_parameter(name) for name in state.family.finetuned_names(model)}
    factors = checked_factors(path, tensors, parameters)
    changeable = {WEIGHTS + name: name for name in parameters.keys() - factors.keys()}
    unknown = sorted(tensors.keys() - gates.keys() - changeable.keys() - factor_tensors(factors).keys())
    if unknown:
        raise AdapterError(f"{path}: expected gates and weights of attention, FFN and head, got also: {unknown[:4]}")
    for name, gate in gates.items():
        tensors[name] = checked(path, name, tensors[name], gate.shape, gate.dtype).to(gate.device)
    weights = {}
    for stored in tensors.keys() & changeable.keys():
        own = parameters[changeable[stored]]
        weight = checked(path, stored, tensors[stored], own.shape, own.dtype).to(own.device)
        weights[changeable[stored]] = nn.Parameter(weight, requires_grad=False)
    weights |= merged_weights(path, model, orders, factors)
    differences = _differences(adapter.config, config)
    if differences:
        logger.warning("%s: %s", path, "; ".join(differences))
    gates_before = {name: gate.clone() for name, gate in gates.items()}
    orders_before = [block.actvar.hidden_order.clone() for block in blocks]
    weights_before, factors_before, execution_before = tuned_parameters(model), tuned_factors(model), state.execution
    try:
        _put(model, tensors, orders, weights, factors)
        state.execution = adapter.execution
    except BaseException:
        state.execution = execution_before
        _put(model, gates_before, orders_before, weights_before, factors_before)
        raise


def _differences(trained: ActVARConfig, used: ActVARConfig) -> list[str]:
    """Return a clause for each field in which two configurations differ."""
    clauses = []
    for name in (field.name for field in fields(ActVARConfig)):
        before, now = getattr(trained, name), getattr(used, name)
        if before != now:
            texts = _short(before), _short(now)
            before, now = texts if texts[0] != texts[1] else (before, now)
            clauses.append(f"{name}: trained with {before}, used with {now}")
    return clauses


def _short(value: object) -> str:
    """Return a field of a configuration as text; rates by block become their range."""
    if not isinstance(value, tuple):
        return str(value)
    parts = [f"{min(part):g} to {max(part):g} by block" if isinstance(part, tuple) else str(part) for part in value]
    return f"({', '.join(parts)})"


def _put(
    model: nn.Module,
    gates: Mapping[str, torch.Tensor],
    orders: Sequence[torch.Tensor | None],
    weights: Mapping[str, nn.Parameter],
    factors: Mapping[str, Factors],
) -> None:
    """Bring gates, orders of hidden units and weights with their factors, all checked before, into the model."""
    restore_parameters(model)
    for index, block in enumerate(patch_state(model).blocks(model)):
        values = {parameter: gates[name] for name, parameter in _gates_of(block, index).items()}
        set_order_and_gates(block, orders[index], values)
    replace_parameters(model, weights, factors)


def read_adapter_config(path: str | Path) -> ActVARConfig:
    """Return the configuration of an adapter, with which `load_adapter` patches an unpatched model.

    Args:
        path: a file of `save_adapter`.

    Raises:
        FileNotFoundError: no such file.
        AdapterError: the file is no adapter, or a damaged one.
    """
    return read_adapter(path, Execution()).config


def describe_adapter(path: str | Path) -> dict[str, object]:
    """Return model sizes, configuration, Execution, training, parameter counts, size and dtypes of an adapter file.

    `parameters` counts gates and changed weights, and `changed weights` the latter alone, factors as the numbers that
    they have. `rank` is that of the factors, None without any, and `bytes` the size of all tensors. `not_finite` names
    the tensors that hold NaN or infinity, with which no adapter is loaded.

    Args:
        path: a file of `save_adapter`.

    Raises:
        FileNotFoundError, AdapterError: as in `read_adapter`.
    """
    adapter = read_adapter(path)
    tensors = adapter.tensors
    return {
        "kind": "adapter",
        **adapter.sizes,
        "config": adapter.config,
        "execution": adapter.execution,
        "training": adapter.training,
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()),
        "changed weights": sum(t.numel() for name, t in tensors.items() if name.startswith((WEIGHTS, FACTORS))),
        "rank": adapter.rank,
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "not_finite": [name for name, t in tensors.items() if t.dtype in DTYPES and not t.isfinite().all()],
    }


def gate_parameters(var: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of selectors and routers of a patched model by their name in an adapter file."""
    blocks = enumerate(patch_state(var).blocks(unwrapped(var)))
    return {name: parameter for index, block in blocks for name, parameter in _gates_of(block, index).items()}


def _gates_of(block: Any, index: int) -> dict[str, nn.Parameter]:
    """Return the parameters of block number `index` by their name in an adapter file."""
    return {
        f"blocks.{index}.{gate}.{name}": parameter
        for gate in ("selector", "router")
        for name, parameter in getattr(block.actvar, gate).named_parameters()
    }


def _sizes(var: nn.Module) -> Mapping[str, object]:
    """Return the sizes of a model as an adapter file records them."""
    return family_of(var).recorded_sizes(var)


def read_adapter(path: str | Path, execution: Execution | None = None) -> Adapter:
    """Read an adapter file.

    Args:
        path: a file of `save_adapter`, or its name on the hub, see `actvar.patching.hub.adapter_file`.
        execution: how to run the model; None for the Execution that the file recommends, which is not read otherwise.

    Raises:
        TypeError: `execution` is no Execution.
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a name on the hub without `huggingface_hub` installed.
        AdapterError: the file is no adapter, or a damaged one.
    """
    if execution is not None:
        checked_execution(execution)
    file, path = adapter_file(path), Path(path)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # of any kind, since the header is untrusted
        raise AdapterError(f"{path}: expected a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"format {metadata.get('format')!r} version {metadata.get('version')!r}"
        raise AdapterError(f"{path}: expected an ActVAR adapter ({FORMAT!r} version {VERSION!r}), got {found}")
    try:
        sizes, training = _sizes_from(metadata["model"]), json.loads(metadata.get("training", "{}"))
        config, recommended = _config_from(metadata["config"])
        if "execution" in metadata:
            recommended = json_object(metadata["execution"])
        if execution is None:
            execution = _execution_from(path, recommended)
        rank = as_integer("rank", json.loads(metadata["rank"])) if "rank" in metadata else None
        check_factors(path, rank, tensors)
        return Adapter(path, sizes, config, execution, training, rank, tensors)
    except AdapterError:
        raise
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: its metadata is damaged: {error}") from error


def _config_from(text: str) -> tuple[ActVARConfig, dict[str, object]]:
    """Return the configuration, and the fields of `Execution` that older files keep in it."""
    values = json_object(text)
    fields = {name: values.pop(once) for once, name in FIELDS_ONCE_IN_CONFIG.items() if once in values}
    return ActVARConfig.from_json(json.dumps(values)), fields


def _execution_from(path: Path, fields: Mapping[str, object]) -> Execution:
    """Return the recommended Execution of `fields`, with defaults for missing ones."""
    if fields.get("expert_execution") == "snap":
        raise AdapterError(
            f"{path}: recommends expert_execution 'snap', which was removed; give 'dense' or 'tile_list' instead, as "
            'in actvar.load_adapter(var, path, actvar.Execution(expert_execution="dense"))'
        )
    return Execution.from_json(json.dumps(fields))


def _sizes_from(text: str) -> dict[str, object]:
    """Return the model's sizes from JSON; raise a ValueError if they are no integers."""
    sizes = json.loads(text)
    if not isinstance(sizes, dict) or not sizes:
        raise ValueError(f"expected the sizes of a model, got {text[:200]!r}")
    lists = [size for size in sizes.values() if isinstance(size, list)]
    numbers = [size for size in sizes.values() if not isinstance(size, list)] + [n for size in lists for n in size]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"expected sizes that are integers or lists of them, got {text[:200]!r}")
    return sizes
