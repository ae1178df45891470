"""Patch a model in place, and take the patch off again, for every model family."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from actvar.config import DENSE, ActVARConfig
from actvar.execution import Execution, checked_execution
from actvar.families import family_of
from actvar.models.arguments import one_thread
from actvar.patching.adapter import AdapterError, put_adapter, read_adapter
from actvar.sparse.block import ActVARBlock
from actvar.sparse.block_state import BlockState, restore_order, set_order_and_gates
from actvar.sparse.called_layers import expect_readable, log_called
from actvar.sparse.schedule import build_schedule
from actvar.sparse.state import PatchState, is_patched, patch_state
from actvar.utils.class_swap import Swapped, restore_class, swap_class
from actvar.utils.devices import device_of
from actvar.utils.weight_override import (
    own_parameters,
    replace_parameters,
    restore_parameters,
    tuned_factors,
    tuned_parameters,
)
from actvar.utils.wrappers import unwrapped
from actvar_kernels.cpu_backend import memory
from actvar_kernels.cpu_backend.packing import drop

logger = logging.getLogger(__name__)


def apply_patch(var: nn.Module, config: ActVARConfig | None = None, execution: Execution | None = None) -> nn.Module:
    """Make the last scales of a VAR sparse, in place, and return `var`.

    The classes of `var` and its blocks are swapped for subclasses, and each block gets a selector and a router.
    Parameters and `state_dict` stay as they are; an adapter may reorder hidden units of the FFN, in place. A model that
    is patched already gets a new patch with fresh gates. Active scales are computed as in eval mode, without dropout
    and stochastic depth.

    Layers that are more than their weight (LoRA, hooks, parametrisations, quantised weights) are called as the dense
    model calls them. A logged line names the parts that are not fused for that reason.

    An error leaves the model unchanged. An interruption (Ctrl-C) leaves it unpatched.

    Args:
        var: `actvar.models.VAR`, or an instance of the public VAR class. The model or its blocks may be inside
            `torch.compile`'s wrapper.
        config: what is computed; None for the paper's configuration.
        execution: how the model is run; None for the default.

    Raises:
        TypeError: a model of an unsupported kind, or a layer that is more than its weight where the configuration's
            experts or selectors have to read it.
        ValueError: a configuration or Execution that does not fit the model, or a block whose `forward` was replaced
            on the instance, which the patch could not reach.
        RuntimeError: another thread is sampling from the model.
    """
    config = ActVARConfig() if config is None else config
    patch_silently(var, config, execution)
    refresh(var)
    warn_untrained(config)
    return var


def accelerate(var: nn.Module, execution: Execution | None = None) -> nn.Module:
    """Let kernels run the dense model, in place, and return `var`. `remove_patch` undoes it.

    Results are the dense model's to rounding. `apply_patch` with rates of 1 does the same.

    Args:
        var: as in `apply_patch`.
        execution: how the model is run; None for the default.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: an Execution that does not fit the model.
    """
    return apply_patch(var, DENSE, execution)


def warn_untrained(config: ActVARConfig, advice: str = "load trained ones with actvar.load_adapter(var, path)") -> None:
    """Log that a model is used without an adapter, unless every rate is 1.

    Args:
        config: the rates of the model.
        advice: what the user should do about it.
    """
    if config.is_sparse:
        logger.warning("selectors and routers are untrained: %s", advice)


def patch_silently(var: nn.Module, config: ActVARConfig, execution: Execution | None = None) -> None:
    """Do the same as `apply_patch` without its warning, for callers that load an adapter next."""
    model = unwrapped(var)
    state = _checked_state(model, config, Execution() if execution is None else execution)
    width, hidden, *_ = state.family.sizes(model)
    block_states = [
        BlockState(width, hidden, config.num_experts, index, state, device_of(block))
        for index, block in enumerate(state.blocks(model))
    ]
    with one_thread(model):
        _install(model, state, block_states)
    log_called(state.called, state.head_called)


def reconfigure(var: nn.Module, config: ActVARConfig, execution: Execution | None = None) -> None:
    """Give a patched model another configuration; gates, order of hidden units and weights stay.

    Args:
        var: a patched model.
        config: what is computed, with as many experts as before.
        execution: how it is run; None for the one from before.

    Raises:
        TypeError, ValueError: the model is not patched, or a configuration or Execution that does not fit it.
    """
    model = unwrapped(var)
    before = patch_state(model)
    if config.num_experts != before.config.num_experts:
        raise ValueError(f"num_experts: the patch has {before.config.num_experts}, got {config.num_experts}")
    state = _checked_state(model, config, before.execution if execution is None else execution)
    with one_thread(model):
        for block, schedule in zip(state.blocks(model), state.schedules, strict=True):
            block.actvar.shared, block.actvar.schedule = state, schedule
            block.actvar.cache.forget()
        model.actvar = state


def _checked_state(model: Any, config: ActVARConfig, execution: Execution) -> PatchState:
    """Return the state of a patch, or raise as `apply_patch` does."""
    family = family_of(model)
    blocks = [unwrapped(block) for block in family.blocks(model)]
    if not isinstance(config, ActVARConfig):
        raise TypeError(f"config: expected an ActVARConfig, got {type(config).__name__}")
    if config.num_blocks not in (None, len(blocks)):
        raise ValueError(f"token_rates, ffn_rate: the model has {len(blocks)} blocks, got {config.num_blocks} rates")
    maps = family.maps(model)
    schedules = tuple(build_schedule(config, maps, block) for block in range(len(blocks)))
    if config.guidance_until is not None and not family.leaves_out_guidance:
        raise ValueError(f"guidance_until: {family.name} does not sample without its unconditional rows; leave it None")
    if config.scales_until is not None and not family.ends_early(model):
        raise ValueError(f"scales_until: {type(model).__name__} samples all scales in a loop of its own; leave it None")
    _, hidden, *_ = family.sizes(model)
    if hidden % config.num_experts:
        raise ValueError(f"num_experts: expected a divisor of the FFN's hidden size {hidden}, got {config.num_experts}")
    _expect_runs(model, execution)
    for index, block in enumerate(blocks):
        if "forward" in block.__dict__:
            raise ValueError(f"expected blocks[{index}] with its class's forward, got one replaced on the instance")
    state = PatchState(config, family, schedules, execution)
    state.called = [family.parts_called(block) for block in blocks]
    state.head_called = family.head_called(model)
    for index, called in enumerate(state.called):
        expect_readable(index, called, schedules[index], config.kv, state.quantized[index])
    return state


def _expect_runs(model: nn.Module, execution: Execution) -> None:
    """Raise a TypeError or ValueError if `execution` cannot run `model`."""
    checked_execution(execution)
    if any(execution.formats(len(family_of(model).blocks(model)))) and not family_of(model).takes_eight_bits:
        raise ValueError(f"weights: {family_of(model).name} does not multiply in eight bits; leave it None")
    follows = family_of(model).loop_fields(model)
    for name in ("sampler", "decoder_dtype", "cuda_graph", "cudnn_benchmark"):
        value, default = getattr(execution, name), getattr(Execution(), name)
        if name not in follows and value not in (default, False):
            models = "actvar.models.VAR" + ("" if name == "cudnn_benchmark" else " or Infinity")
            raise ValueError(
                f"{name}: {value!r} needs {models}, whose sampling loop it is part of, got {type(model).__name__}; "
                "load the checkpoint with actvar.load_var or actvar.load_infinity, or use "
                f"actvar.Execution({name}={default!r})"
            )


def _install(model: Any, state: PatchState, block_states: list[BlockState]) -> None:
    """Put a patch, with a state for each block, in place of the one that is there, if any."""
    try:
        take_off(model)
        for block, block_state in zip(state.blocks(model), block_states, strict=True):
            block.actvar = block_state.train(block.training)
            swap_class(block, ActVARBlock)
        model.actvar = state
        swap_class(model, state.family.model_mixin)
    except BaseException:
        take_off(model)
        raise


def remove_patch(var: nn.Module) -> nn.Module:
    """Undo `apply_patch`, bit for bit, and return `var`. An unpatched VAR is left as it is.

    This also removes the remains of an interrupted `apply_patch` or `remove_patch`. Patches of single blocks go too,
    even of wrapped blocks or of blocks from another model. The layers may have changed since. An FFN with reordered
    hidden units that was wrapped or quantised keeps their order, in which it computes the same sum; a logged line says
    so.

    Args:
        var: as in `apply_patch`.

    Raises:
        TypeError: a model of an unsupported kind.
        RuntimeError: another thread is sampling from the model.
    """
    take_off(var)
    refresh(var)
    return var


def take_off(var: nn.Module) -> None:
    """Do the same as `remove_patch`, but keep packed copies of weights, which the next sample checks anyway."""
    model = unwrapped(var)
    if not is_patched(model):
        family_of(model)
    with one_thread(model):
        restore_parameters(model)
        for module in list(model.modules()):
            if "actvar" in module._modules:
                restore_order(module)
            if isinstance(module, Swapped):
                restore_class(module)
            if "actvar" in module.__dict__ or "actvar" in module._modules:
                del module.actvar


def refresh(module: nn.Module) -> None:
    """Drop the packed copies that kernels keep of the weights in `module`.

    On a CPU a sample of a patched model, and `fhat_to_img` of an autoencoder, find changed weights themselves. On a
    GPU, and in direct calls of `actvar_kernels.linear`, `expert_ffn` and `conv3x3`, changes are found that PyTorch
    counts or that move the weight. Call this there after any other change (through `.data`, by fused optimizers,
    through NumPy), of the autoencoder on a GPU and of the arguments of direct calls. The CUDA graphs of a
    patched model are dropped as well.

    Args:
        module: a model, or any part of one.
    """
    if is_patched(unwrapped(module)):
        unwrapped(module).actvar.graphs.release()
    in_place = [parameter for part in module.modules() for parameter in part._parameters.values()]
    drop(parameter for parameter in (*in_place, *own_parameters(module).values()) if parameter is not None)


def release_cache(var: nn.Module) -> None:
    """Give back the memory that a patched model keeps from one sample for the next.

    It holds the K/V cache, on a GPU the CUDA graphs of samples with their pool of memory, on the CPU packed copies of
    weights, and up to 1 GiB that the decoder used.

    Args:
        var: a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    for block in patch_state(var).blocks(unwrapped(var)):
        block.actvar.cache.kv_buffer = None
    refresh(var)
    memory.release()


@contextmanager
def unpatched(var: nn.Module) -> Iterator[nn.Module]:
    """Give the dense model with its own weights while the context is open.

    An existing patch is put back afterwards, with the same gates, weights and Execution.

    Args:
        var: as in `apply_patch`.

    Raises:
        TypeError: a model of an unsupported kind.
        ValueError: the blocks are not those that were patched.
    """
    model = unwrapped(var)
    before = patch_state(model) if is_patched(model) else None
    family_of(model)
    block_states = [block.actvar for block in before.blocks(model)] if before is not None else []
    orders = [block_state.hidden_order.clone() for block_state in block_states]
    weights, factors = tuned_parameters(model), tuned_factors(model)
    try:
        take_off(model)
        yield var
    finally:
        take_off(model)
        if before is not None:
            _install(model, before, block_states)
            for block, order in zip(before.blocks(model), orders, strict=True):
                set_order_and_gates(block, order)
            replace_parameters(model, weights, factors)


def load_adapter(var: nn.Module, path: str | Path, execution: Execution | None = None) -> nn.Module:
    """Load selectors, routers and changed weights of an adapter, in place, and return `var`.

    An unpatched model is patched with the adapter's own configuration and the Execution that the adapter recommends. A
    patched model keeps its configuration and Execution. One logged line names the rates, scales or K/V mode that differ
    from the adapter's.

    The FFN's hidden units are brought into the adapter's order. Weights that stage 2 of the distillation changed take
    the place of the model's own, which stay in memory. `remove_patch` undoes both. Everything is read into memory, so
    the file may be written to afterwards.

    Low-rank factors are merged into the model's own weights as `W + B A`, in float32, and rounded once to the weights'
    dtype. In float32 the result is that of the training. In bfloat16 it errs by at most 1/256 of each merged weight, as
    much as by rounding whole weights; smaller changes may be lost. Own weights that change later are not merged anew.

    An exception or Ctrl-C leaves the model as it was, patched or not.

    Args:
        var: as in `apply_patch`.
        path: a file of `save_adapter`, made for the model's sizes and, if the model is patched, its number of experts.
            It may be on the hub: `owner/repo` or `owner/repo@revision`, of which `adapter.safetensors` is read, or
            `owner/repo:file`.
        execution: how the model is run from now on; None for the Execution named above.

    Raises:
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a name on the hub without `huggingface_hub` installed.
        TypeError: a model of an unsupported kind.
        AdapterError: a file that is no adapter, or does not fit the model; the message names the file, what was
            expected and what came.
        ValueError: the blocks are not those that were patched.
        RuntimeError: another thread is sampling from the model.
    """
    load_silently(var, path, execution)
    refresh(var)
    return var


def load_silently(var: nn.Module, path: str | Path, execution: Execution | None = None) -> None:
    """Do the same as `load_adapter`, but keep packed copies of weights, which the next sample checks anyway."""
    model = unwrapped(var)
    if is_patched(model):
        execution = patch_state(model).execution if execution is None else execution
        _expect_runs(model, execution)
        put_adapter(model, read_adapter(path, execution))
        return
    family_of(model)
    adapter = read_adapter(path, execution)
    adapter.expect_made_for(model)
    try:
        try:
            patch_silently(model, adapter.config, adapter.execution)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
        put_adapter(model, adapter)
    except BaseException:
        take_off(model)
        raise


@contextmanager
def patched(
    var: nn.Module,
    config: ActVARConfig | None = None,
    adapter: str | Path | None = None,
    execution: Execution | None = None,
) -> Iterator[nn.Module]:
    """Patch the model while the context is open, by `apply_patch`, or by `load_adapter` if an adapter is given.

    An existing patch is put back afterwards, with its gates, weights and Execution.

    Args:
        var: as in `apply_patch`.
        config: what is computed; None for the adapter's own configuration, or the paper's without an adapter. A logged
            line names how it differs from the adapter's, as in `load_adapter`.
        adapter: a file of `save_adapter`, or None.
        execution: how the model is run; None for the Execution that the adapter recommends, or the default without one.

    Raises:
        FileNotFoundError, TypeError, AdapterError, ValueError, RuntimeError: as in `apply_patch` and `load_adapter`.
    """
    with patched_silently(var, config, adapter, execution):
        if adapter is None:
            warn_untrained(patch_state(var).config)
        yield var


@contextmanager
def patched_silently(
    var: nn.Module, config: ActVARConfig | None, adapter: str | Path | None, execution: Execution | None = None
) -> Iterator[nn.Module]:
    """Do the same as `patched` without its warning, for callers that have given it."""
    with unpatched(var):
        if adapter is None:
            patch_silently(var, ActVARConfig() if config is None else config, execution)
        elif config is None:
            load_silently(var, adapter, execution)
        else:
            from_file = read_adapter(adapter, execution)
            patch_silently(var, config, from_file.execution)
            put_adapter(unwrapped(var), from_file)
        yield var
