"""Load VAR and its autoencoder from official or own checkpoints, with every size read off the tensors.

Files are never trusted. Pickles are read as weights only, and sizes that do not fit together are an error.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actvar.models.checkpoint import infinity_sizes as infinity_of
from actvar.models.checkpoint import sizes as sizes_of
from actvar.models.checkpoint.files import CheckpointError, PathLike, fail, read_file
from actvar.models.checkpoint.sizes import DERIVED, HIT_COUNTS
from actvar.models.checkpoint.states import KIND_NAMES, StateDict, as_keys, choose, expect_found, state_dicts
from actvar.models.infinity import InfinityTokenizer
from actvar.models.var import VAR
from actvar.models.vqvae import VQVAE
from actvar.utils.files import read_mapped
from actvar.utils.modes import inference_mode

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SECOND_MASK = ("quantizer.lfq.mask", "quantize.lfq.mask")
"""Two names of one buffer in the official files of Infinity's tokenizer."""
NOT_FINITE_BY_DESIGN = ("attn_bias_for_masking", HIT_COUNTS)

MODELS: dict[str, tuple[Callable[..., Any], Callable[..., nn.Module]]] = {
    sizes_of.VAR_KIND: (sizes_of.var_sizes, sizes_of.var_skeleton),
    sizes_of.AUTOENCODER_KIND: (sizes_of.autoencoder_sizes, sizes_of.autoencoder_skeleton),
    sizes_of.INFINITY_KIND: (infinity_of.infinity_sizes, infinity_of.infinity_alone),
    sizes_of.TOKENIZER_KIND: (infinity_of.tokenizer_sizes, infinity_of.tokenizer_alone),
}
"""Name for each kind of model what reads its sizes, and what makes a model of them on the meta device."""

logger = logging.getLogger(__name__)


@inference_mode(False)  # inference tensors could not be trained, nor checked for changes
def load_var(
    var_checkpoint: PathLike,
    vae_checkpoint: PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    key: str | Sequence[str] | None = None,
) -> tuple[VQVAE, VAR]:
    """Load a transformer and its autoencoder in eval mode, without gradients.

    Weights are read into memory, so the files may be written to afterwards.

    The weights may be nested in a training run's file, such as the public trainer's
    `{"trainer": {"var_wo_ddp": ..., "vae_local": ...}}`, which may be given as both files. Prefixes that all their
    names share, such as `module.` and `_orig_mod.`, are taken off, and other values are not read. The buffers
    `lvl_1L`, `attn_bias_for_masking`, `zero_k_bias` and `ema_vocab_hit_SV` may be missing.

    Args:
        var_checkpoint: transformer as `.pth`, `.pt`, `.bin`, `.ckpt` or `.safetensors`; shards as their
            folder or their `.safetensors.index.json` or `.bin.index.json`; or a file on the hub as
            `owner/repo:file.pth` or `owner/repo@revision:file.pth`. A leading `~` is the home folder.
        vae_checkpoint: autoencoder, in the same formats. It may have been trained with other patch_nums than the
            transformer. The transformer's are used, and the codebook's hit counts are then zeros `[S, V]`.
        device: device of both models.
        dtype: floating dtype of the transformer's parameters and buffers (`lvl_1L` stays int64); the autoencoder is
            float32. Files of another precision are converted.
        key: the state dict to load where a file has several of the same kind: its keys joined by dots, such as
            `"ema"` or `"trainer.var_wo_ddp"`, or the first of them. It applies to both files; several keys may be
            given.

    Returns:
        `(vae, var)`, with `vae` also at `var.vae_proxy[0]`.

    Raises:
        CheckpointError: a file that is damaged, of the wrong kind, incomplete, of inconsistent sizes, or that holds
            values which are not finite in `dtype`; a pickle with Python objects, which are never loaded; several state
            dicts to choose from, which the message names; or two files that do not belong together.
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a hub id without `huggingface_hub` installed.
        ValueError: a `device` that this torch cannot use.
        TypeError: a `dtype` that is not a floating one of 16 to 64 bits, or a `key` that is not a string.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    device = usable_device(device)
    kinds = sizes_of.VAR_KIND, sizes_of.AUTOENCODER_KIND
    var_state, vae_state = states_of_pair(var_checkpoint, vae_checkpoint, kinds, key)
    var_sizes = read_sizes(var_checkpoint, var_state)
    vae_sizes = read_sizes(vae_checkpoint, vae_state)
    try:
        vae, var = sizes_of.pair_skeleton(var_sizes, vae_sizes)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{var_checkpoint} with {vae_checkpoint}: {error}") from error
    vae_tensors = vae_state.tensors
    if HIT_COUNTS in vae_tensors and vae_tensors[HIT_COUNTS].shape != vae.quantize.ema_vocab_hit_SV.shape:
        del vae_tensors[HIT_COUNTS]
    assign(vae_checkpoint, vae, vae_tensors, device, torch.float32)
    assign(var_checkpoint, var, var_state.tensors, device, dtype)
    logger.info(
        "loaded %s%s (%s) and %s%s (%s)",
        *(var_checkpoint, place_of(var_state), var_sizes),
        *(vae_checkpoint, place_of(vae_state), vae_sizes),
    )
    return vae, var


def states_of_pair(
    first: PathLike, second: PathLike, kinds: tuple[str, str], key: str | Sequence[str] | None
) -> tuple[StateDict, StateDict]:
    """Return the state dicts of two files, of one kind each.

    Args:
        first, second: the files, which may be the same.
        kinds: of their models, keys of `MODELS`.
        key: see `load_var`.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, TypeError: see `load_var`.
    """
    keys = as_keys(key)
    of_first, of_second = states_of_kind(first, kinds[0]), states_of_kind(second, kinds[1])
    expect_found(f"{first} and {second}", keys, [*of_first, *of_second])
    return chosen(first, of_first, keys), chosen(second, of_second, keys)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device named `device`.

    Raises:
        ValueError: this torch cannot put tensors with values there.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0]  # a list of all devices follows
        raise ValueError(f"device: expected cpu or cuda, as this torch can use it, got {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError("device: expected one with memory, got 'meta'")
    return found


def describe_checkpoint(path: PathLike, key: str | Sequence[str] | None = None) -> dict[str, object]:
    """Describe what a checkpoint holds; `path` and `key` are those of `load_var`.

    Returns:
        a dictionary of JSON-compatible values: `kind` is `"var"`, `"autoencoder"`, `"infinity"` or
        `"infinity_tokenizer"`, and `key` the place in the file, empty for the top level. Sizes have the names of
        `build_vae_var` or `build_infinity`. VAR also has `heads`, its autoencoder the `scales` that it was trained
        with, or None, and Infinity `token_bits`. `parameters` counts them without buffers, `bytes`
        is the size of all tensors, and `dtypes` the number of tensors by dtype. `not_finite` names weights that hold
        NaN or infinity, with which no model is loaded.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, TypeError: as in `load_var`, but not for values that are not
            finite.
    """
    state = _read_state(path, key)
    sizes, tensors = read_sizes(path, state), state.tensors
    try:
        module = MODELS[state.kind][1](sizes)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    expected = module.state_dict()
    if HIT_COUNTS in tensors:
        expected[HIT_COUNTS] = tensors[HIT_COUNTS]
    _check(path, expected, tensors)
    return {
        "kind": state.kind,
        "key": state.key,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(sizes).items()},
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "not_finite": [
            name for name, tensor in tensors.items() if _must_be_finite(name, tensor) and not _finite(tensor)
        ],
    }


def read_tensors(path: PathLike, key: str | Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read the tensors of the state dict in a file; `path` and `key` are those of `load_var`.

    Returns:
        tensors on the CPU by the model's names, in the file's shapes and dtypes. They are mapped from the file where
        its format allows that: copy the ones to keep before anyone may write to the file.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, TypeError: as in `load_var`.
    """
    return _read_state(path, key).tensors


def _read_state(path: PathLike, key: str | Sequence[str] | None) -> StateDict:
    """Read the one state dict that `key` chooses."""
    keys, states = as_keys(key), state_dicts(path, read_file(path))
    expect_found(path, keys, states)
    return chosen(path, states, keys)


def states_of_kind(path: PathLike, kind: str) -> list[StateDict]:
    """Read the state dicts of one kind; raise CheckpointError if there is none."""
    states = state_dicts(path, read_file(path))
    found = [state for state in states if state.kind == kind]
    if not found:
        is_var = kind in (sizes_of.VAR_KIND, sizes_of.AUTOENCODER_KIND)
        order = "load_var(var_checkpoint, vae_checkpoint)" if is_var else "load_infinity(model, tokenizer)"
        fail(path, KIND_NAMES[kind], f"{KIND_NAMES[states[0].kind]}; the order is {order}")
    return found


def chosen(path: PathLike, states: Sequence[StateDict], keys: Sequence[str]) -> StateDict:
    """Return the one of `states` that `keys` choose, with plain tensors."""
    state = choose(path, states, keys)
    if state.kind == sizes_of.TOKENIZER_KIND and SECOND_MASK[0] in state.tensors:
        state.tensors.pop(SECOND_MASK[1], None)
    _check_plain(path, state.tensors)
    return state


def place_of(state: StateDict) -> str:
    """Return where in its file a state dict is, for a message."""
    return f" under `{state.key}`" if state.key else ""


def _check_plain(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor without memory of its size, since a small file could claim any shape."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            fail(path, f"`{name}` as a plain tensor", f"{tensor.layout} {tensor.dtype} on {tensor.device}")
        stored = tensor.untyped_storage().nbytes()
        if stored < tensor.nbytes:
            fail(path, f"{tensor.nbytes} bytes for `{name}` of shape {tuple(tensor.shape)}", f"{stored} bytes")
    total = sum(tensor.nbytes for tensor in tensors.values())
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors.values())}
    if total > sum(storages.values()):
        fail(path, f"{total} bytes for its tensors together", f"{sum(storages.values())} bytes")


def read_sizes(path: PathLike, state: StateDict) -> Any:
    """Return the sizes of a state dict, by its kind."""
    try:
        return MODELS[state.kind][0](state.tensors)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check(path: PathLike, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check names, shapes and kinds of numbers; the error names the first few that differ."""
    missing = [name for name in expected if name not in found and not name.endswith(DERIVED)]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        fail(
            path,
            f"{len(expected)} tensors",
            f"{len(found)}: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}",
        )
    for name, meta in expected.items():
        if name not in found:
            continue
        if found[name].shape != meta.shape:
            fail(path, f"`{name}` of shape {tuple(meta.shape)}", f"{tuple(found[name].shape)}")
        if meta.is_floating_point() and not found[name].is_floating_point():
            fail(path, f"`{name}` with floating point values", f"{found[name].dtype}")


def assign(
    path: PathLike,
    module: nn.Module,
    tensors: dict[str, Tensor],
    device: str | torch.device,
    dtype: torch.dtype,
    dtype_around: torch.dtype | None = None,
) -> None:
    """Read the weights of `module`, which is on the meta device, into memory one at a time, and empty `tensors`.

    Args:
        path: the file's name in errors.
        module: the model.
        tensors: tensors of the file by the model's names.
        device, dtype: where and in which floating dtype they go.
        dtype_around: the floating dtype of what is in no block; None: `dtype`.
    """
    expected = module.state_dict()
    _check(path, expected, tensors)
    missing = expected.keys() - tensors.keys()
    values = {}
    for name, meta in expected.items():
        floating = dtype if dtype_around is None or name.startswith("block") else dtype_around
        target = floating if meta.is_floating_point() else meta.dtype
        if name in missing:
            values[name] = torch.zeros(meta.shape, device=device, dtype=target)
            continue
        values[name] = read_mapped(tensors.pop(name), device, target)
        if _must_be_finite(name, meta) and not _finite(values[name]):
            low, high = (bound.item() for bound in values[name].aminmax())
            fail(path, f"finite values of `{name}` in {target}", f"a range of [{low}, {high}]")
    module.requires_grad_(False)
    module.load_state_dict(values, assign=True)
    if isinstance(module, VAR | InfinityTokenizer) and missing:
        module.init_buffers()


def _must_be_finite(name: str, tensor: Tensor) -> bool:
    """Return whether NaN and infinity in a tensor are an error."""
    return tensor.is_floating_point() and not name.endswith(NOT_FINITE_BY_DESIGN)


def _finite(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are finite."""
    low, high = (tensor if tensor.dtype in DTYPES else tensor.float()).aminmax()  # 8-bit types have no `aminmax`
    return bool(low.isfinite() and high.isfinite())
