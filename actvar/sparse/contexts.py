"""Open contexts around the calls of a patched model: what it records, and how its rows are meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actvar.sparse.record import BlockRecord
from actvar.sparse.state import patch_state


@contextmanager
def record(model: Any) -> Iterator[list[BlockRecord]]:
    """Collect a `BlockRecord` per block and active scale in the list that is given, while the context is open.

    Args:
        model: a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    state = patch_state(model)
    records: list[BlockRecord] = []
    previous, state.records = state.records, records
    try:
        yield records
    finally:
        state.records = previous


@contextmanager
def guided_rows(model: Any) -> Iterator[None]:
    """Tell a patched model that its rows are conditional ones followed by as many unconditional ones.

    A sampling loop of your own needs this for `share_cfg_selection`. The models' own methods do it themselves.

    Args:
        model: a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    with patch_state(model).during(rows_are_guided=True):
        yield
