"""Find the state dicts in what a checkpoint file holds, whatever they are nested in, and choose one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from actvar.models.checkpoint.files import PathLike, fail
from actvar.models.checkpoint.sizes import AUTOENCODER_KIND, INFINITY_KIND, TOKENIZER_KIND, VAR_KIND

KIND_NAMES = {
    VAR_KIND: "a VAR transformer (names such as `blocks.0.attn.mat_qkv.weight`)",
    AUTOENCODER_KIND: "VAR's autoencoder (names such as `encoder.conv_in.weight`)",
    INFINITY_KIND: "an Infinity transformer (names such as `block_chunks.0.module.0.sa.mat_qkv.weight`)",
    TOKENIZER_KIND: "Infinity's tokenizer (names such as `encoder.conv_in.conv.weight`)",
}
WRAPPERS = {"module", "_orig_mod"}
"""Names that DistributedDataParallel and `torch.compile` put before those of the module they wrap."""
MOST_NESTED = 8
MOST_NAMED = 20
MARK = re.compile(r"(|.*?\.)(blocks|block_chunks|encoder|decoder|quantize)\.")
CHUNK = re.compile(r"(block_chunks\.\d+)\.")
AUTOENCODER_PARTS = ("encoder.", "decoder.", "quantize.", "quantizer.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class StateDict:
    """Hold a state dict in a file.

    Args:
        kind: `"var"`, `"autoencoder"`, `"infinity"` or `"infinity_tokenizer"`.
        key: its place in the file: the keys of the mappings around it and the prefix that its names share, joined by
            dots. An empty key is the top level.
        tensors: tensors by the model's names.
    """

    kind: str
    key: str
    tensors: dict[str, Tensor]

    def is_under(self, key: str) -> bool:
        """Return whether `key` is the key of this state dict, or leads to it."""
        return self.key == key or self.key.startswith(key + ".")


def state_dicts(path: PathLike, content: Mapping[Any, Any]) -> list[StateDict]:
    """Find every state dict of a known kind, and ignore other values.

    Args:
        path: the file's name in errors.
        content: the result of `read_file`.

    Raises:
        CheckpointError: there is no state dict, or one has a name twice, with and without a wrapper's prefix.
    """
    found = [
        StateDict(kind, ".".join((*keys, *filter(None, root.split(".")))), tensors)
        for keys, flat in _mappings(content)
        for root, kind, tensors in _split(path, flat)
    ]
    if not found:
        fail(path, "a state dict of " + " or of ".join(KIND_NAMES.values()), _overview(content))
    return found


def choose(path: PathLike, states: Sequence[StateDict], keys: Sequence[str]) -> StateDict:
    """Return the one of `states` that `keys` choose, or the only one; `states` must not be empty.

    Raises:
        CheckpointError: several state dicts are left; the message names them.
    """
    under = [state for state in states if any(map(state.is_under, keys))]
    exactly = [state for state in under if state.key in keys]
    left = exactly or under or list(states)
    if len(left) > 1:
        example = left[-1].key
        fail(
            path,
            f"one state dict; choose with key={example!r} (on the command line --key {example!r})",
            f"{len(left)}: {_named(left)}",
        )
    return left[0]


def as_keys(key: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the keys of a `key` argument.

    Raises:
        TypeError: neither a string nor a sequence of strings.
    """
    if key is None:
        return ()
    keys = tuple(key) if isinstance(key, Sequence) and not isinstance(key, str) else (key,)
    if not all(isinstance(key, str) for key in keys):
        raise TypeError(f"key: expected a string such as 'ema' or 'trainer.var_wo_ddp', or several, got {key!r}")
    return keys


def expect_found(path: PathLike, keys: Sequence[str], states: Sequence[StateDict]) -> None:
    """Check that each of `keys` leads to one of `states`.

    Raises:
        CheckpointError: a key leads to none of them.
    """
    for key in keys:
        if not any(state.is_under(key) for state in states):
            fail(path, f"a state dict under the key {key!r}", _named(states))


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the keys of each mapping, outer mappings first, with the tensors directly in it."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for keys, mapping in waiting:  # the list grows during the loop
        if id(mapping) in seen:  # a pickle may hold a mapping at many places, and even in itself
            continue
        seen.add(id(mapping))
        yield keys, {n: v.detach() for n, v in mapping.items() if isinstance(n, str) and isinstance(v, Tensor)}
        if len(keys) < MOST_NESTED:
            waiting += [((*keys, str(n)), v) for n, v in mapping.items() if isinstance(v, Mapping)]


def _split(path: PathLike, flat: Mapping[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Yield prefix, kind and tensors of each model whose names `flat` holds under a prefix of their own."""
    kinds: dict[str, set[str]] = {}
    for mark in filter(None, map(MARK.match, flat)):
        kinds.setdefault(mark[1], set()).add(VAR_KIND if mark[2].startswith("block") else AUTOENCODER_KIND)
    members: dict[str, dict[str, Tensor]] = {root: {} for root in kinds}
    for name, tensor in flat.items():
        root = _longest_prefix(name, members)
        if root is None:
            continue
        plain = ".".join(part for part in name.removeprefix(root).split(".") if part not in WRAPPERS)
        plain = CHUNK.sub(r"\1.module.", plain)  # here `module` is the model's own name, not a wrapper's
        if plain in members[root]:
            fail(path, f"`{root}{plain}` once", f"it also as `{name}`")
        members[root][plain] = tensor
    for root, tensors in members.items():
        if len(kinds[root]) == 1:
            (kind,) = kinds[root]
            yield root, _model_of(kind, tensors), tensors
            continue
        for kind in (VAR_KIND, AUTOENCODER_KIND):
            is_part = {n: n.startswith(AUTOENCODER_PARTS) == (kind == AUTOENCODER_KIND) for n in tensors}
            part = {name: tensor for name, tensor in tensors.items() if is_part[name]}
            yield root, _model_of(kind, part), part


def _model_of(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the kind of a transformer or an autoencoder, which is Infinity's where names tell."""
    if kind == VAR_KIND:
        return INFINITY_KIND if any(".sa." in name for name in tensors) else kind
    return TOKENIZER_KIND if any(".conv1.conv." in name or "conv_in.conv." in name for name in tensors) else kind


def _longest_prefix(name: str, prefixes: Mapping[str, object]) -> str | None:
    """Return the longest of `prefixes`, each empty or with a dot at its end, that `name` starts with."""
    while name:
        name = name.rpartition(".")[0]
        prefix = name and name + "."
        if prefix in prefixes:
            return prefix
    return None


def _named(states: Sequence[StateDict]) -> str:
    """Return a text with the keys and kinds of state dicts."""
    named = [f"`{state.key}` ({state.kind})" if state.key else f"the top level ({state.kind})" for state in states]
    return ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else "")


def _overview(content: Mapping[Any, Any]) -> str:
    """Return a text about a file without a state dict: other values first, then tensors."""
    others = [
        f"{name!r} with a value of type {type(value).__name__}"
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    tensors = (f"`{'.'.join((*keys, name))}`" for keys, flat in _mappings(content) for name in flat)
    return ", ".join((*others[:3], *islice(tensors, 3))) or "no tensors"
