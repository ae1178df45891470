"""Let a model draw tokens by a sampler of your choice for a while, patched or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from actvar.models import Infinity
from actvar.models.token_draw import fast_draw
from actvar.patching.patch import reconfigure
from actvar.sparse.state import is_patched, patch_state
from actvar.utils.attributes import replaced
from actvar.utils.wrappers import unwrapped


@contextmanager
def drawn_by(var: Any, sampler: str | None) -> Iterator[None]:
    """Let `var` draw its tokens by `sampler` while the context is open, so that several ways can be compared.

    Args:
        var: an `actvar.models.VAR` or `Infinity`, dense or patched. A patch must not be changed while the context is
            open.
        sampler: one of `actvar.execution.SAMPLERS`; None leaves the model as it is.
    """
    model = unwrapped(var)
    if is_patched(model):
        state = patch_state(model)
        if sampler is not None and sampler != state.execution.sampler:
            reconfigure(model, state.config, replace(state.execution, sampler=sampler))
            try:
                yield
            finally:
                reconfigure(model, state.config, state.execution)
            return
    elif sampler == "fast":
        method, draw = ("draw_bits", _fast_bits) if isinstance(model, Infinity) else ("draw", fast_draw)
        with replaced(model, **{method: draw}):
            yield
        return
    yield


def _fast_bits(scale: int, logits: Any, draw: Any, rng: Any) -> Any:
    """Return bits as `Infinity.draw_bits` does, by the fast sampler."""
    return fast_draw(logits, None, draw.top_k, draw.top_p, rng, scale)
