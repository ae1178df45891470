"""Load Infinity and its tokenizer from official or own checkpoints, with every size read off the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from actvar.models.checkpoint.files import CheckpointError, PathLike
from actvar.models.checkpoint.infinity_sizes import InfinitySizes, TokenizerSizes, infinity_pair
from actvar.models.checkpoint.load import (
    DTYPES,
    assign,
    logger,
    place_of,
    read_sizes,
    states_of_pair,
    usable_device,
)
from actvar.models.checkpoint.sizes import INFINITY_KIND, TOKENIZER_KIND
from actvar.models.checkpoint.states import StateDict
from actvar.models.infinity import Infinity, InfinityTokenizer
from actvar.utils.modes import inference_mode

NOT_READ = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Buffers of the public training code, which no sampling needs."""


@inference_mode(False)  # inference tensors could not be trained, nor checked for changes
def load_infinity(
    model: PathLike,
    tokenizer: PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    key: str | Sequence[str] | None = None,
) -> tuple[InfinityTokenizer, Infinity]:
    """Load Infinity and its tokenizer in eval mode, without gradients.

    Files are mapped, and weights are read into memory one at a time, in their final dtype and on their device. The
    files may be written to afterwards.

    Args:
        model: transformer, such as `infinity_2b_reg.pth` or the folder `infinity_8b_weights`, in the formats of
            `load_var`.
        tokenizer: such as `infinity_vae_d32reg.pth`, in the same formats.
        device: device of both models.
        dtype: floating dtype of the transformer's blocks. Its other parts are float32, or float64 if the blocks are;
            the tokenizer is float32. Files of another precision are converted.
        key: the state dict to load where a file has several of the same kind, as in `load_var`.

    Returns:
        `(tokenizer, infinity)`, with the tokenizer also at `infinity.vae_proxy[0]`.

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
    read = _read_pair(model, tokenizer, key)
    (model_state, tokenizer_state), (decoder, infinity) = read.states, read.skeletons
    assign(tokenizer, decoder, tokenizer_state.tensors, device, torch.float32)
    assign(model, infinity, model_state.tensors, device, dtype, torch.promote_types(dtype, torch.float32))
    logger.info(
        "loaded %s%s (%s) and %s%s (%s)",
        *(model, place_of(model_state), read.sizes[0]),
        *(tokenizer, place_of(tokenizer_state), read.sizes[1]),
    )
    return decoder, infinity


def sizes_of_files(model: PathLike, tokenizer: PathLike, key: str | Sequence[str] | None = None) -> InfinitySizes:
    """Return the sizes of the transformer in two files, of which no values are read.

    Args:
        model, tokenizer, key: as in `load_infinity`.

    Raises:
        CheckpointError, FileNotFoundError, ImportError, TypeError: as in `load_infinity`, but not for the names, shapes
            and values of other tensors than those that sizes are read from.
    """
    return _read_pair(model, tokenizer, key).sizes[0]


class _Pair(NamedTuple):
    """Hold the state dicts of transformer and tokenizer, their sizes, and tokenizer and transformer without weights."""

    states: tuple[StateDict, StateDict]
    sizes: tuple[InfinitySizes, TokenizerSizes]
    skeletons: tuple[InfinityTokenizer, Infinity]


def _read_pair(model: PathLike, tokenizer: PathLike, key: str | Sequence[str] | None) -> _Pair:
    """Read the names and shapes of two files' tensors, and check that the files belong together."""
    states = states_of_pair(model, tokenizer, (INFINITY_KIND, TOKENIZER_KIND), key)
    for name in NOT_READ:
        states[0].tensors.pop(name, None)
    sizes = read_sizes(model, states[0]), read_sizes(tokenizer, states[1])
    try:
        return _Pair(states, sizes, infinity_pair(*sizes))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{model} with {tokenizer}: {error}") from error
