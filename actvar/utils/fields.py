"""Check fields of configurations that have a fixed choice of values, and read their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that a field's value is one of its choices.

    Args:
        name: name of the field, for the message.
        value: any object.
        choices: all allowed values.

    Raises:
        TypeError: `value` is neither a string nor None.
        ValueError: `value` is a string or None, but no choice.
    """
    if not isinstance(value, str | None):
        raise TypeError(f"{name}: expected one of {choices}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that `text` holds.

    Raises:
        TypeError: `text` is no string.
        ValueError: `text` is no JSON, another kind of JSON value than an object, or nested too deeply.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("expected a JSON object, got one that is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {text[:200]!r}")
    return values


def check_names(values: Mapping[str, object], known: set[str]) -> None:
    """Raise a ValueError if `values` has a name that is not in `known`."""
    if not values.keys() <= known:
        raise ValueError(f"expected a JSON object with fields among {sorted(known)}, got {str(values)[:200]}")
