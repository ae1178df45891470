"""Find and read checkpoint files of every format; nothing in a file is trusted, and no code in a file runs."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from actvar.utils.files import first_line

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
INDEX_END = ".index.json"
SHARD_SUFFIXES = (".safetensors", ".bin")
"""Ends of the names of shards that an index may name; the end of the index's own name says which."""
SHARD_NAME = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?:(.+)")
REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """Report a checkpoint that cannot be used, with the file, what was expected and what was found."""


def fail(path: PathLike, expected: str, found: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the CheckpointError of a file, with the texts of what was expected and found."""
    raise CheckpointError(f"{path}: expected {expected}, found {found}") from cause


def read_file(path: PathLike) -> Mapping[Any, Any]:
    """Read the content of a checkpoint: tensors, mappings of the same kind, or other plain values, by name.

    Tensors are on the CPU, and mapped from the file where its format allows that. The caller reads their values before
    it returns to the user, who may then write to the file.

    Args:
        path: `.pth`, `.pt`, `.bin` or `.ckpt` from `torch.save`, read as weights only; `.safetensors`; a folder of
            safetensors shards, or of `.bin` shards with an index; their `.safetensors.index.json` or `.bin.index.json`;
            or `owner/repo:file` or `owner/repo@revision:file` on the hub. A leading `~` is the home folder.

    Raises:
        CheckpointError: an empty, truncated or otherwise unreadable file; shards that are missing or hold the same
            tensor; a pickle with Python objects.
        FileNotFoundError: no such file, here or on the hub.
        ImportError: a hub id without `huggingface_hub` installed.
    """
    file = locate(path)
    if file.is_dir():
        return _read_folder(path, file)
    if not file.is_file():
        fail(path, "a checkpoint file, or a folder of shards", "neither a file nor a folder")
    if file.stat().st_size == 0:
        fail(path, "a checkpoint", "an empty file")
    suffix = file.suffix.lower()
    if _shards_of_index(file.name) is not None:
        return _read_index(path, file)
    if suffix == ".safetensors":
        return _read_safetensors(path, file)
    if suffix in PICKLE_SUFFIXES:
        return _read_pickle(path, file)
    fail(path, f"a file name that ends in {', '.join(PICKLE_SUFFIXES)}, .safetensors or {INDEX_END}", f"`{suffix}`")


def locate(path: PathLike) -> Path:
    """Return the path of a file on this machine, after a download into the hub's cache if it is on the hub.

    Raises:
        FileNotFoundError, ImportError: as in `read_file`.
    """
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: expected a home folder that is known: {error}") from error
    if file.exists():
        return file
    hub_id = HUB_ID.fullmatch(os.fspath(path))
    if hub_id is None:
        raise FileNotFoundError(
            f"{path}: no such file (a file on the hub is written `owner/repo:file.pth` or "
            "`owner/repo@revision:file.pth`)"
        )
    return _downloaded(os.fspath(path), dict(repo_id=hub_id[1], filename=hub_id[3], revision=hub_id[2]))


def _downloaded(path: str, place: dict[str, Any]) -> Path:
    """Return the cached copy of a file on the hub.

    `hf_hub_download` tries an unreachable hub for 20 seconds and logs every try, so one request goes before it.

    Args:
        path: the file's name in errors.
        place: `repo_id`, `filename` and `revision` of the file.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise ImportError(f"{path} is on the hub; to download it, run `pip install 'actvar[hub]'`") from error
    not_there = EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    unreachable = None
    try:
        get_hf_file_metadata(hf_hub_url(**place))
    except not_there as error:
        raise FileNotFoundError(f"{path}: not found on the hub: {first_line(error)}") from error
    except Exception as error:  # the network library, and so its errors, depends on the hub package's version
        unreachable = error
    try:
        return Path(hf_hub_download(**place, local_files_only=unreachable is not None))
    except (*not_there, OSError, ValueError) as error:
        reason = f"the hub cannot be reached ({first_line(unreachable)})" if unreachable else first_line(error)
        raise FileNotFoundError(f"{path}: not in the hub's cache on this machine, and {reason}") from error


# Safetensors


def _read_safetensors(path: PathLike, file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Map the tensors `names` of a safetensors file, or all of them if None."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            stored = dict.fromkeys(opened.keys())
            wanted = stored if names is None else [name for name in names if name in stored]
            tensors = {name: opened.get_tensor(name) for name in wanted}
    except Exception as error:
        fail(_place(path, file), "a complete safetensors file", _start_of(file), error)
    _expect_named(path, file, names or (), stored)
    return tensors


def _place(path: PathLike, file: Path) -> str:
    """Return the name of one file of a checkpoint for errors."""
    return os.fspath(path) if os.fspath(path).endswith(file.name) else f"{path}: {file.name}"


def _read_folder(path: PathLike, folder: Path) -> dict[str, Tensor]:
    """Map the tensors of all shards in a folder; `.bin` shards need an index, and safetensors are preferred to them."""
    by_suffix = (sorted(folder.glob(f"*{suffix}{INDEX_END}")) for suffix in SHARD_SUFFIXES)
    indices = next(filter(None, by_suffix), [])
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        fail(path, "a folder with one index; name the one to load", f"the indices {names}")
    if indices:
        return _read_index(path, indices[0])
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        found = "a folder without any .safetensors file and without an index of .bin shards"
        fail(path, "a checkpoint file, or a folder of shards", found)
    _expect_all_parts(path, [shard.name for shard in shards])
    tensors: dict[str, Tensor] = {}
    shard_of: dict[str, str] = {}
    for shard in shards:
        found = _read_safetensors(path, shard)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            fail(
                path,
                "shards of one checkpoint (name a file to load that one)",
                f"`{twice[0]}` in both {shard_of[twice[0]]} and {shard.name}",
            )
        tensors |= found
        shard_of |= dict.fromkeys(found, shard.name)
    return tensors


def _expect_all_parts(path: PathLike, names: list[str]) -> None:
    """Raise CheckpointError if a number of the files `<stem>-<number>-of-<count>` is missing."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := SHARD_NAME.fullmatch(name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), found in numbers.items():
        if len(found) < count:
            missing = [number for number in range(1, count + 1) if number not in found]
            fail(path, f"{count} shards of {stem}", f"{len(found)}: missing are those with the numbers {missing[:8]}")


def _shards_of_index(name: str) -> str | None:
    """Return the suffix of the shards that an index of this name lists, or None if the name is not that of an index."""
    return next((suffix for suffix in SHARD_SUFFIXES if name.endswith(suffix + INDEX_END)), None)


def _read_index(path: PathLike, index: Path) -> dict[str, Tensor]:
    """Map the tensors that an index of shards names."""
    suffix = _shards_of_index(index.name) or SHARD_SUFFIXES[0]
    expected = f'an index of shards: {{"weight_map": {{"name": "file{suffix}", ...}}}}'
    try:
        parsed = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        fail(path, expected, _start_of(index), error)
    shard_of = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        fail(path, expected, f"no `weight_map` in {index.name}")
    names_of: dict[str, list[str]] = {}
    for name, shard in shard_of.items():
        if not _is_shard_name(shard, suffix):
            fail(path, f"file names of {suffix} shards beside the index", f"{shard!r} for `{name}`")
        names_of.setdefault(shard, []).append(name)
    files = {shard: index.with_name(shard) for shard in names_of}
    missing = [shard for shard, file in files.items() if not file.is_file()]
    if missing and not Path(path).expanduser().exists():
        folder = os.fspath(path).removesuffix(index.name)
        files |= {shard: locate(folder + shard) for shard in missing}
    elif missing:
        fail(path, f"{len(files)} shards beside {index.name}", f"{len(missing)} of them missing: {missing[:8]}")
    read = _read_safetensors if suffix == ".safetensors" else _read_pickled_shard
    tensors: dict[str, Tensor] = {}
    for shard, names in names_of.items():
        tensors |= read(path, files[shard], names)
    return tensors


def _is_shard_name(shard: object, suffix: str) -> bool:
    """Return whether an index may name `shard`, which must be a file in the index's own folder."""
    return (
        isinstance(shard, str)
        and shard.endswith(suffix)
        and PurePosixPath(shard).name == shard
        and not set(shard) & {"\\", ":", "\0"}
    )


def _expect_named(path: PathLike, file: Path, names: Iterable[str], stored: Iterable[str]) -> None:
    """Raise CheckpointError unless a shard has all tensors that the index names."""
    missing = sorted(set(names).difference(stored))
    if missing:
        fail(path, f"{len(missing)} more tensors in {file.name}, as the index says", f"no {missing[:3]} there")


# Pickles


def _read_pickled_shard(path: PathLike, file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Map the tensors `names` of a shard from `torch.save`."""
    content = _read_pickle(_place(path, file), file)
    stored = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    _expect_named(path, file, names, stored)
    return {name: stored[name] for name in names}


def _read_pickle(path: PathLike, file: Path) -> Mapping[Any, Any]:
    """Load the mapping in a file of `torch.save`, as weights only."""
    expected = "a complete file from `torch.save(module.state_dict())`, without Python objects other than tensors"
    try:
        is_zip = _is_zip_of_stored_records(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        refused = REFUSED_GLOBAL.search(str(error))
        fail(path, expected, _start_of(file) if refused is None else _how_to_save_anew(file, refused[1]), error)
    if not isinstance(content, Mapping):
        fail(path, expected, f"a {type(content).__name__}")
    return content


def _how_to_save_anew(file: Path, refused: str) -> str:
    """Return a text about a pickle with the Python object `refused`, and how to save its weights without."""
    return (
        f"`{refused}`, which could run code and is not loaded. Only if you trust whoever made the file, save its "
        f"weights anew: import torch; saved = torch.load({str(file)!r}, map_location='cpu', weights_only=False); "
        "torch.save(saved['model'], 'weights.pth'), with the key that the weights are under instead of 'model', or "
        "saved.state_dict() if the file holds a whole module"
    )


def _is_zip_of_stored_records(file: Path) -> bool:
    """Return whether a file is a zip file, as `torch.save` has written since version 1.6, without compressed records.

    A compressed record could unfold to any size.

    Raises:
        ValueError: a zip file with compressed records, or with records that claim more bytes than the file has.
        zipfile.BadZipFile: a damaged zip file.
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


def _start_of(file: Path) -> str:
    """Return a text about the size and the first bytes of a file."""
    with file.open("rb") as stream:
        return f"{file.stat().st_size} bytes that start with {stream.read(16)!r}"
