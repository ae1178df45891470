"""Check the arguments of Infinity's sampling before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from actvar.models import arguments
from actvar.models.arguments import checked_finite, checked_integer
from actvar_kernels.checks import as_items, expect_shape

TextArgument = tuple[torch.Tensor, Sequence[int]]
"""Features `[sum of lengths, text_channels]` of texts behind each other, and the number of tokens of each."""


class Draw(NamedTuple):
    """Hold how bits are drawn: seeds, guidance and temperature of every scale, filters, and where guidance acts."""

    g_seed: int | tuple[int, ...] | None
    cfg: tuple[float, ...]
    tau: tuple[float, ...]
    top_k: int
    top_p: float
    insertion: tuple[int, ...]

    @property
    def is_guided(self) -> bool:
        """Return whether any scale is guided, so that there are rows for what the images are guided away from."""
        return any(strength != 1 for strength in self.cfg)

    def off(self) -> Draw:
        """Return the same without guidance after blocks."""
        return self._replace(insertion=())


def checked_draw(
    scales: int,
    depth: int,
    cfg: float | Sequence[float],
    tau: float | Sequence[float],
    top_k: int,
    top_p: float,
    g_seed: int | Sequence[int] | None,
    insertion: Sequence[int],
) -> Draw:
    """Return the arguments of `Infinity.sample` that say how bits are drawn, as Python's own numbers.

    Args:
        scales: number of scales.
        depth: number of blocks.
        cfg, tau, top_k, top_p, g_seed, insertion: those of `Infinity.sample`.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an argument out of its range.
    """
    seeds, _, top_k, top_p = arguments.checked_draw(g_seed, 1.0, top_k, top_p)
    by_scale = {name: _by_scale(name, value, scales) for name, value in (("cfg", cfg), ("tau", tau))}
    if min(by_scale["tau"]) <= 0:
        raise ValueError(f"tau: expected numbers above 0, got {min(by_scale['tau'])}")
    layers = as_items(insertion)
    if layers is None:
        raise TypeError(f"insertion: expected a sequence such as (0,) or (-5,), got {insertion!r:.100}")
    layers = tuple(checked_integer("insertion", layer, -depth, 0) for layer in layers)
    if not layers and any(strength != 1 for strength in by_scale["cfg"]):
        raise ValueError("insertion: expected where guidance acts, such as (0,) for the logits, got nothing")
    return Draw(seeds, by_scale["cfg"], by_scale["tau"], min(top_k, 2), top_p, layers)


def _by_scale(name: str, value: float | Sequence[float], scales: int) -> tuple[float, ...]:
    """Return one number for each scale, from one for all or from as many as there are scales."""
    items = as_items(value)
    numbers = (value,) * scales if items is None else items
    if len(numbers) != scales:
        raise ValueError(f"{name}: expected a number, or one for each of the {scales} scales, got {len(numbers)}")
    return tuple(checked_finite(name, number) for number in numbers)


def checked_text(name: str, text: object, lengths: object, unconditional: torch.Tensor) -> list[int]:
    """Return the lengths of texts as Python's own numbers.

    Args:
        name: name of the texts, for errors.
        text: features, `[sum of lengths, text_channels]`.
        lengths: number of tokens of each text.
        unconditional: the model's unconditional features, `[text_maxlen, text_channels]`.

    Raises:
        TypeError: features that are no floating-point tensor, or lengths that are no sequence of integers.
        ValueError: features of another shape or on another device, no text, or a text without tokens or with too many.
    """
    items = as_items(lengths)
    of_lengths = "lengths" if name == "text" else f"lengths of {name}"
    if items is None:
        raise TypeError(f"{of_lengths}: expected a sequence of integers, got {type(lengths).__name__}")
    if not items:
        raise ValueError(f"{of_lengths}: expected the number of tokens of each text, got none")
    most, channels = unconditional.shape
    numbers = [checked_integer(of_lengths, length, 1, most) for length in items]
    expect_shape(name, text, (sum(numbers), channels))
    assert isinstance(text, torch.Tensor)
    if not text.is_floating_point():
        raise TypeError(f"{name}: expected floating-point features of tokens, got {text.dtype}")
    if text.device != unconditional.device:
        raise ValueError(f"{name}: expected features on {unconditional.device}, where the model is, got {text.device}")
    return numbers


def checked_negative(negative: object, count: int, unconditional: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return features and lengths of negative texts.

    Args:
        negative: a pair of features and lengths.
        count: number of images.
        unconditional: as in `checked_text`.

    Raises:
        TypeError: no pair, or as in `checked_text`.
        ValueError: another number of texts than images, or as in `checked_text`.
    """
    if not isinstance(negative, Sequence) or len(negative) != 2:
        raise TypeError(f"negative: expected a pair (text, lengths), got {type(negative).__name__}")
    text, lengths = negative
    numbers = checked_text("negative", text, lengths, unconditional)
    if len(numbers) != count:
        raise ValueError(f"negative: expected one text for each of {count} images, got {len(numbers)}")
    return text, numbers
