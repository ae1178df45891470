"""State shared by the blocks of a patched model, and the record of what they chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.families import unwrapped
from actvar.schedule import Scale


@dataclass
class BlockRecord:
    """What one block chose at one active scale.

    `index` `[R, K]` tokens within the scale and `scores` `[R, L]`, or None without selection; `u` `[R, K, C]` the FFN's
    input; `mask` bool and `logits` `[R, K, N]`, or None without experts. Under teacher forcing also the block's input
    `[R, L_all, C]` and condition.
    """

    block: int
    scale: Scale
    index: torch.Tensor | None
    scores: torch.Tensor | None
    u: torch.Tensor
    mask: torch.Tensor | None
    logits: torch.Tensor | None
    block_input: torch.Tensor | None = None
    cond: torch.Tensor | None = None

    def only(self, rows: list[int]) -> BlockRecord:
        """The same record of some rows."""
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


@dataclass
class Shared:
    """One per patched model: configuration, schedule, and what holds during a call."""

    config: ActVARConfig
    schedule: tuple[Scale, ...]
    rows_are_guided: bool = False
    writes_in_place: bool = False
    records: list[BlockRecord] | None = None
    by_shape: dict[tuple[int, int], Scale] = field(init=False)

    def __post_init__(self):
        self.by_shape = {(scale.tokens, scale.cached_before): scale for scale in self.schedule}

    @property
    def selection_is_shared(self) -> bool:
        return self.config.share_cfg_selection and self.rows_are_guided

    def scale_of(self, tokens: int, cached: int) -> Scale:
        """The scale that has `tokens` tokens and finds `cached` rows in the K/V cache.

        Raises:
            ValueError: there is none.
        """
        scale = self.by_shape.get((tokens, cached))
        if scale is None:
            known = ", ".join(f"{t} after {c}" for t, c in self.by_shape)
            raise ValueError(
                f"expected the tokens of one scale with the K/V cache of the scales before it ({known} cached rows), "
                f"got {tokens} tokens after {cached}. Enable caching with block.attn.kv_caching(True) before the first "
                "scale, or pass attn_bias for teacher forcing."
            )
        return scale


@contextmanager
def record(model: nn.Module) -> Iterator[list[BlockRecord]]:
    """Collect a `BlockRecord` per block and active scale while the context is open.

    Raises:
        ValueError: the model is not patched.
    """
    shared = shared_state(model)
    previous, shared.records = shared.records, []
    try:
        yield shared.records
    finally:
        shared.records = previous


@contextmanager
def guided_rows(model: nn.Module) -> Iterator[None]:
    """Tell a patched model that its rows are conditional ones followed by as many unconditional ones.

    Needed for `share_cfg_selection` in a sampling loop of your own; the models' own methods say so themselves.

    Raises:
        ValueError: the model is not patched.
    """
    shared = shared_state(model)
    previous, shared.rows_are_guided = shared.rows_are_guided, True
    try:
        yield
    finally:
        shared.rows_are_guided = previous


@contextmanager
def writing_in_place(model: nn.Module) -> Iterator[None]:
    """Let the kernels of a patched model's blocks write their result into their input, unless a hook might keep it."""
    shared, blocks = shared_state(model), [unwrapped(block) for block in model.blocks]
    previous = shared.writes_in_place
    shared.writes_in_place = not any(
        block._forward_hooks or block._forward_pre_hooks for block in (*model.blocks, *blocks)
    )
    try:
        yield
    finally:
        shared.writes_in_place = previous


def shared_state(model: nn.Module) -> Shared:
    """The shared state of a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    model = unwrapped(model)
    shared = getattr(model, "__dict__", {}).get("actvar")
    if not isinstance(shared, Shared):
        raise ValueError(f"expected a model patched by actvar.apply_patch, got an unpatched {type(model).__name__}")
    return shared
