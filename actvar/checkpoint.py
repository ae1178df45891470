"""Load VAR and its autoencoder from official or own checkpoints; every size is read off the tensors.

Files are never trusted: pickles are read as weights only, and sizes that do not fit together are an error.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from actvar import checkpoint_sizes as sizes_of
from actvar.models.var import VAR
from actvar.models.vqvae import VQVAE
from actvar.modes import inference_mode

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+):(.+)")
HIT_COUNTS = "quantize.ema_vocab_hit_SV"
NOT_FINITE_BY_DESIGN = ("attn_bias_for_masking", HIT_COUNTS)
KIND_NAMES = {
    sizes_of.VAR_KIND: "a VAR transformer (names such as `blocks.0.attn.mat_qkv.weight`)",
    sizes_of.AUTOENCODER_KIND: "VAR's autoencoder (names such as `encoder.conv_in.weight`)",
}

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, what was expected and what was found."""


@inference_mode(False)  # weights of an inference tensor's kind could not be trained, nor checked for changes
def load_var(
    var_checkpoint: PathLike,
    vae_checkpoint: PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[VQVAE, VAR]:
    """Load a transformer and its autoencoder in eval mode, without gradients.

    Weights that need no conversion stay mapped from the file while the models live on the CPU: memory is used once,
    and the file must not be overwritten in place meanwhile (replacing it by a rename is fine).

    Args:
        var_checkpoint: transformer as `.pth`, `.pt`, `.bin`, `.safetensors`, or on the hub as `owner/repo:file.pth`.
        vae_checkpoint: autoencoder, likewise. It may have been trained with other patch_nums than the transformer's,
            which are the ones used; its codebook hit counts are then zeros `[S, V]`.
        device: where both models go.
        dtype: floating dtype of the transformer's parameters and buffers (`lvl_1L` stays int64); the autoencoder is
            float32. Files of another precision are converted.

    Returns:
        `(vae, var)`, with `vae` also at `var.vae_proxy[0]`.

    Raises:
        CheckpointError: a file that is damaged, of the wrong kind, incomplete, of inconsistent sizes, or holds values
            that are not finite in `dtype`; or two files that do not belong together.
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a hub id without `huggingface_hub` installed.
        ValueError: a `device` that this torch cannot use.
        TypeError: a `dtype` that is not a floating one of 16 to 64 bits.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    device = usable_device(device)
    var_tensors = _read_kind(var_checkpoint, sizes_of.VAR_KIND)
    vae_tensors = _read_kind(vae_checkpoint, sizes_of.AUTOENCODER_KIND)
    var_sizes = _sizes(var_checkpoint, var_tensors)
    vae_sizes = _sizes(vae_checkpoint, vae_tensors)
    try:
        vae, var = sizes_of.pair_skeleton(var_sizes, vae_sizes)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{var_checkpoint} with {vae_checkpoint}: {error}") from error
    counts_shape = vae.quantize.ema_vocab_hit_SV.shape
    if vae_tensors[HIT_COUNTS].shape != counts_shape:
        vae_tensors[HIT_COUNTS] = torch.zeros(counts_shape)
    _assign(vae_checkpoint, vae, vae_tensors, device, torch.float32)
    _assign(var_checkpoint, var, var_tensors, device, dtype)
    logger.info("loaded %s (%s) and %s (%s)", var_checkpoint, var_sizes, vae_checkpoint, vae_sizes)
    return vae, var


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: this torch cannot put tensors with values there.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0]  # torch goes on with all that it knows of its devices
        raise ValueError(f"device: expected cpu or cuda, as this torch can use it, got {device!r}: {reason}") from error
    if found.type == "meta":
        raise ValueError("device: expected one with memory, got 'meta'")
    return found


def describe_checkpoint(path: PathLike) -> dict[str, object]:
    """What a checkpoint holds, from names and shapes alone; `path` as in `load_var`.

    Returns:
        `kind` (`"var"` or `"autoencoder"`), its sizes under the names of `build_vae_var` (a transformer also has
        `heads`, an autoencoder the `scales` it was trained with), `parameters` (their number, without buffers),
        `bytes` (of all tensors) and `dtypes` (name -> number of tensors). Values are JSON-compatible.

    Raises:
        CheckpointError, FileNotFoundError, ImportError: as in `load_var`.
    """
    tensors = read_tensors(path)
    sizes = _sizes(path, tensors)
    is_var = isinstance(sizes, sizes_of.VarSizes)
    try:
        module = sizes_of.var_skeleton(sizes) if is_var else sizes_of.autoencoder_skeleton(sizes)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    expected = module.state_dict()
    if not is_var:
        expected[HIT_COUNTS] = tensors[HIT_COUNTS]
    _check(path, expected, tensors)
    return {
        "kind": sizes_of.VAR_KIND if is_var else sizes_of.AUTOENCODER_KIND,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(sizes).items()},
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
    }


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, mapped from the file instead of read where its format allows.

    Args:
        path: `.pth`, `.pt` or `.bin` (a flat state dict, read as weights only: code in a pickle never runs),
            `.safetensors`, or `owner/repo:file.pth` on the hub. Old-format pickles are read, not mapped.

    Returns:
        name -> tensor, in the file's shapes and dtypes.

    Raises:
        CheckpointError: an empty, truncated or otherwise unreadable file, or one that is not a flat dict of plain
            tensors.
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a hub id without `huggingface_hub` installed.
    """
    file = _local(path)
    if not file.is_file():
        _fail(path, "a checkpoint file", "a folder" if file.is_dir() else "a device or a pipe")
    if file.stat().st_size == 0:
        _fail(path, "a checkpoint", "an empty file")
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        tensors = _read_safetensors(path, file)
    elif suffix in PICKLE_SUFFIXES:
        tensors = _read_pickle(path, file)
    else:
        _fail(path, f"a file name that ends in {', '.join(PICKLE_SUFFIXES)} or .safetensors", repr(file.suffix))
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > file.stat().st_size:
        _fail(path, f"{total} bytes for its tensors together", f"{file.stat().st_size} bytes")
    return tensors


def _fail(path: PathLike, expected: str, found: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{path}: expected {expected}, found {found}") from cause


def _local(path: PathLike) -> Path:
    """The file on this machine; a hub id is downloaded into the hub's cache."""
    if Path(path).exists():
        return Path(path)
    hub_id = HUB_ID.fullmatch(os.fspath(path))
    if hub_id is None:
        raise FileNotFoundError(f"{path}: no such file (a file on the hub is written `owner/repo:file.pth`)")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(f"{path} is on the hub; to download it, run `pip install actvar[hub]`") from error
    try:
        return Path(hf_hub_download(repo_id=hub_id[1], filename=hub_id[2]))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{path}: not found on the hub, or the hub cannot be reached and the file is not in the local cache"
        ) from error


def _start_of(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{file.stat().st_size} bytes that start with {stream.read(16)!r}"


def _read_safetensors(path: PathLike, file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        _fail(path, "a complete safetensors file", _start_of(file), error)


def _read_pickle(path: PathLike, file: Path) -> dict[str, Tensor]:
    expected = "a complete file from `torch.save(module.state_dict())`, without Python objects other than tensors"
    try:
        is_zip = _is_zip_of_stored_records(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        _fail(path, expected, _start_of(file), error)
    if not isinstance(state, Mapping):
        _fail(path, expected, f"a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            _fail(
                path,
                "a flat state dict of names and tensors (save a nested one under its own file name)",
                f"{name!r} with a value of type {type(value).__name__}",
            )
    return {name: value.detach() for name, value in state.items()}


def _is_zip_of_stored_records(file: Path) -> bool:
    """Whether it is a zip file, as `torch.save` has written them since 1.6, with every record stored as it is: a
    compressed one could unfold to any size.

    Raises:
        ValueError: a zip file with other records, or with more than it has room for.
        zipfile.BadZipFile: one that is damaged.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size for record in records
    ):
        raise ValueError("its records are compressed")
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError("its records claim more bytes than the file has")
    return True


def _check_plain(path: PathLike, name: str, tensor: Tensor) -> None:
    """Reject what has no memory of its own size behind it: a small file could claim any shape."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        _fail(path, f"`{name}` as a plain tensor", f"{tensor.layout} {tensor.dtype} on {tensor.device}")
    stored = tensor.untyped_storage().nbytes()
    if stored < tensor.nbytes:
        _fail(path, f"{tensor.nbytes} bytes for `{name}` of shape {tuple(tensor.shape)}", f"{stored} bytes")


def _read_kind(path: PathLike, kind: str) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    found = sizes_of.kind_of(tensors)
    if found not in (kind, None):
        hint = "; the order is load_var(var_checkpoint, vae_checkpoint)"
        _fail(path, KIND_NAMES[kind], KIND_NAMES[found] + hint)
    return tensors


def _sizes(path: PathLike, tensors: Mapping[str, Tensor]) -> sizes_of.VarSizes | sizes_of.AutoencoderSizes:
    kind = sizes_of.kind_of(tensors)
    if kind is None:
        names = ", ".join(f"`{name}`" for name in list(tensors)[:3]) or "no tensors"
        _fail(path, " or ".join(KIND_NAMES.values()), names)
    try:
        return (sizes_of.var_sizes if kind == sizes_of.VAR_KIND else sizes_of.autoencoder_sizes)(tensors)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check(path: PathLike, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Same names, shapes and kinds of numbers, or one error about the first few that differ."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        _fail(
            path,
            f"{len(expected)} tensors",
            f"{len(found)}: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}",
        )
    for name, meta in expected.items():
        if found[name].shape != meta.shape:
            _fail(path, f"`{name}` of shape {tuple(meta.shape)}", f"{tuple(found[name].shape)}")
        if meta.is_floating_point() and not found[name].is_floating_point():
            _fail(path, f"`{name}` with floating point values", f"{found[name].dtype}")


def _assign(
    path: PathLike, module: nn.Module, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype
) -> None:
    """Give the meta `module` its weights, one converted tensor at a time; empties `tensors`."""
    expected = module.state_dict()
    _check(path, expected, tensors)
    converted = {}
    for name, meta in expected.items():
        target = dtype if meta.is_floating_point() else meta.dtype
        converted[name] = tensors.pop(name).to(device, target).contiguous()
        if meta.is_floating_point() and not name.endswith(NOT_FINITE_BY_DESIGN):
            _check_finite(path, name, converted[name])
    module.requires_grad_(False)
    module.load_state_dict(converted, assign=True)


def _check_finite(path: PathLike, name: str, tensor: Tensor) -> None:
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        _fail(path, f"finite values of `{name}` in {tensor.dtype}", f"a range of [{low.item()}, {high.item()}]")
