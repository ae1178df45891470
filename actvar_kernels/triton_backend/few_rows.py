"""Say where a dense block of few rows takes 5 launches: where a measured table says so, or nowhere."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from actvar_kernels.triton_backend.forced import Forced
from actvar_kernels.triton_backend.tuned_choices import tuned_few_rows


def few_rows_wanted(x: torch.Tensor, hidden: int) -> bool:
    """Return whether a block of rows `x` `[R, L, C]` with `hidden` units in its FFN takes 5 launches."""
    return tuned_few_rows(x, hidden) if _forced.value is None else _forced.value


_forced = Forced[bool]()


def using_few_rows(wanted: bool) -> AbstractContextManager[None]:
    """Let every dense block whose rows are few take 5 launches, or none, for the duration of the context."""
    return _forced.using(wanted)
