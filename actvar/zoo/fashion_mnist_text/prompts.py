"""Read prompts of the bundled model of texts: how many garments they name, and how large images of these are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from actvar.models.infinity.schedules import Schedule
from actvar.text.words import JOINING, WordEncoder, parts_of
from actvar.zoo.fashion_mnist_text.architecture import MOST_WORDS, SQUARE, WIDE

NOUNS = (
    ("t-shirt", "tee"),
    ("trousers", "pants"),
    ("pullover", "sweater"),
    ("dress",),
    ("coat",),
    ("sandal",),
    ("shirt",),
    ("sneaker", "trainer"),
    ("bag", "handbag"),
    ("ankle boot", "boot"),
)
"""Names of each class, in the order of `data.CLASSES`."""
_LAST_WORDS = {name.split()[-1] for names in NOUNS for name in names}
_SHADES = ("", "dark ", "bright ", "patterned ")
PROMPTS = tuple(f"{shade}{names[0]}" for shade in _SHADES for names in NOUNS)
"""Texts of all kinds of clothes, to which an adapter is fitted where no others are given."""
PAIRS = tuple(
    f"{_SHADES[shift % 4]}{NOUNS[left][0]} and {_SHADES[(shift // 4 + left) % 4]}{NOUNS[(left + shift) % 10][0]}"
    for shift in range(1, 11)
    for left in range(10)
)
"""The same for images of two garments: every kind beside every kind."""


def schedule_of_prompts(prompts: Sequence[str], encoder: WordEncoder) -> Schedule:
    """Return the schedule of the images that prompts were trained with, `SQUARE` of one garment and `WIDE` of two.

    Args:
        prompts: one text or more.
        encoder: of the model, which knows its words.

    Raises:
        ValueError: a prompt that the encoder does not read, one without a garment or with several that no word joins,
            or one garment in some prompts and two in others.
    """
    counts: dict[int, str] = {}
    for prompt in prompts:
        counts.setdefault(_garments(prompt, encoder), prompt)
    if len(counts) > 1:
        one, two = counts[1], counts[2]
        raise ValueError(
            "prompts: expected one garment in each or two in each, since images that are drawn together have one size, "
            f"got {one!r:.100} and {two!r:.100}; draw them one after the other"
        )
    return WIDE if 2 in counts else SQUARE


def _garments(prompt: str, encoder: WordEncoder) -> int:
    """Return the number of garments in a prompt, 1 or 2."""
    words = encoder.words_of(prompt, MOST_WORDS)
    parts = parts_of(words)
    named = Counter(part for word, part in zip(words, parts, strict=True) if word in _LAST_WORDS)
    if any(named[part] != 1 for part in range(parts[-1] + 1)):
        raise ValueError(
            f"prompt: expected a garment, or two that one of {', '.join(JOINING)} joins, such as 'a dark bag and a "
            f"dress', got {prompt!r:.100}"
        )
    return parts[-1] + 1
