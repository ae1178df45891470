"""State shared by the blocks of a patched model, and the record of what they chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from actvar.config import ActVARConfig
from actvar.execution import Execution
from actvar.families import unwrapped
from actvar.sparse.passes import Pass, Passes
from actvar.sparse.schedule import Scale


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
    """Hold what the blocks of a patched model share: configuration, schedules, and what holds during a call.

    `config` says what is computed, `execution` how it is run. `schedule` is that of the first block, except that a
    scale is selected or routed where it is in any block.
    `rows_are_guided`: conditional rows, then as many unconditional ones; `reuses_room`: the K/V cache may stay in the
    memory that the last sample left; `writes_in_place`: a block may write its result into its input; `seed` `[1]`
    int64: of the fast sampler, for samples without a seed of their own; `passes`: those of which tensors are alive;
    `traced`: the one that a compiler is tracing as a whole, if any; `called`: by block, the parts that kernels do not
    read, and why; `head_called`: why the head is not read; `called_is_new`: these are not logged yet.
    """

    config: ActVARConfig
    schedules: tuple[tuple[Scale, ...], ...]
    execution: Execution = field(default_factory=Execution)
    rows_are_guided: bool = False
    reuses_room: bool = False
    writes_in_place: bool = False
    seed: torch.Tensor | None = None
    records: list[BlockRecord] | None = None
    passes: Passes = field(default_factory=Passes)
    traced: Pass | None = None
    called: list[dict[str, str]] = field(init=False)
    head_called: str | None = None
    called_is_new: bool = False
    schedule: tuple[Scale, ...] = field(init=False)
    by_shape: tuple[dict[tuple[int, int], Scale], ...] = field(init=False)

    def __post_init__(self):
        self.schedule = tuple(
            replace(of_blocks[0], select=any(s.select for s in of_blocks), route=any(s.route for s in of_blocks))
            for of_blocks in zip(*self.schedules, strict=True)
        )
        self.called = [{} for _ in self.schedules]
        self.by_shape = tuple({(s.tokens, s.cached_before): s for s in schedule} for schedule in self.schedules)

    @contextmanager
    def during(self, **flags: bool) -> Iterator[None]:
        """Set `rows_are_guided`, `reuses_room` or `writes_in_place` while the context is open."""
        state, previous = vars(self), {name: getattr(self, name) for name in flags}
        try:
            state.update(flags)
            yield
        finally:
            state.update(previous)

    def pass_of(self, block: int, x: torch.Tensor, cond: torch.Tensor) -> Pass:
        """Return the pass in which block number `block` gets `x` `[R, L, C]` and the condition `cond`.

        Raises:
            RuntimeError: activation checkpointing runs the block again, and its pass is not known.
        """
        if self.traced is not None:
            return self.traced
        if not self._needs_passes:
            return Pass(self.rows_are_guided)
        return self.passes.enter(block, x, cond, self.rows_are_guided)

    def hand_on(self, current: Pass, out: torch.Tensor) -> None:
        """Let a block's output lead the next block to the pass."""
        if self.traced is None and self._needs_passes:
            self.passes.bind(current, out)

    @property
    def _needs_passes(self) -> bool:
        return self.config.fixed_tokens or self.config.share_cfg_selection

    def scale_of(self, block: int, tokens: int, cached: int) -> Scale:
        """The scale that has `tokens` tokens and finds `cached` rows in the K/V cache of block number `block`.

        Raises:
            ValueError: there is none.
        """
        scale = self.by_shape[block].get((int(tokens), int(cached)))  # which a trace has as tensors
        if scale is None:
            known = ", ".join(f"{t} after {c}" for t, c in self.by_shape[block])
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
    with shared_state(model).during(rows_are_guided=True):
        yield


def shared_state(model: nn.Module) -> Shared:
    """Return the shared state of a patched model.

    Raises:
        ValueError: the model is not patched, or its blocks are not the ones that were patched.
    """
    model = unwrapped(model)
    if not is_patched(model):
        raise ValueError(f"expected a model patched by actvar.apply_patch, got an unpatched {type(model).__name__}")
    _expect_own_blocks(model)
    return model.actvar


def is_patched(model: nn.Module) -> bool:
    """Return True for a model that a patch has been put on."""
    return isinstance(getattr(model, "__dict__", {}).get("actvar"), Shared)


def _expect_own_blocks(model: nn.Module) -> None:
    """Raise ValueError unless the blocks of a patched model are those that were patched, in their order."""
    blocks, count = model.blocks, len(model.actvar.schedules)
    for index, block in enumerate(blocks):
        gates = getattr(block, "actvar", None)
        if gates is None:
            problem = f"the patch is gone from blocks[{index}], or the block is new"
        elif gates.shared is not model.actvar:
            problem = f"the patch on blocks[{index}] is that of another model"
        elif gates.block_index != index:
            problem = f"blocks[{index}] is the one that was patched as blocks[{gates.block_index}]"
        else:
            continue
        break
    else:
        if len(blocks) == count:
            return
        problem = f"{len(blocks)} blocks are left"
    raise ValueError(
        f"expected the {count} blocks that were patched, in their order, but {problem}; call actvar.remove_patch(var), "
        "then actvar.apply_patch(var, config) again. A shallow copy (copy.copy) shares the blocks of its model; "
        "copy.deepcopy makes others"
    )
