"""Find the forward pass that a block's call belongs to, by the tensors that the block is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

ADVICE = "checkpoint the blocks one by one, and keep what they are given on its device"


def computing_again() -> bool:
    """Return True while a backward pass runs a part of the forward pass again, as activation checkpointing does."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


@dataclass
class Pass:
    """Hold what the blocks share in one pass, at one scale or under teacher forcing.

    Args:
        rows_are_guided: whether conditional rows come first, then as many unconditional ones; None if not known.
        tokens: the first block's choice where all blocks update the same tokens, `[R, K]` int64 by scale index.
    """

    rows_are_guided: bool | None
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)

    def are_guided(self) -> bool:
        """Return `rows_are_guided`.

        Raises:
            RuntimeError: it is not known.
        """
        if self.rows_are_guided is None:
            raise RuntimeError(
                "share_cfg_selection: expected the input that the first block had in the forward pass, got another one "
                f"from activation checkpointing, so whether its rows are guided is not known; {ADVICE}"
            )
        return self.rows_are_guided

    def tokens_of(self, scale: int, rows: int) -> torch.Tensor:
        """Return the tokens `[rows, K]` of one scale.

        Raises:
            ValueError: the first block chose none at this scale, or for another number of rows.
        """
        tokens = self.tokens.get(scale)
        if tokens is None or len(tokens) != rows:
            chosen = "none" if tokens is None else f"those of {len(tokens)} rows"
            raise ValueError(
                f"fixed_tokens: expected the first block's tokens for {rows} rows at scale {scale}, got {chosen}; run "
                "the blocks in order, each on all rows that the first one had"
            )
        return tokens


class Passes:
    """Find the pass of a block's call. Copies and pickles know of none.

    Activation checkpointing runs a block again when other passes may have run since. Some checkpoints hand on detached
    tensors, so only the memory of the block's arguments is the same then. The condition, and the input and output of
    every block, therefore lead to their pass for as long as they are in memory.
    """

    def __init__(self):
        self._passes_by_memory: Any = WeakIdKeyDictionary()  # memory -> place in it -> pass

    def enter(self, block: int, x: torch.Tensor, cond: torch.Tensor, rows_are_guided: bool) -> Pass:
        """Return the pass in which block number `block` gets `x` `[R, L, C]` and the condition `cond`.

        Args:
            block: number of the block.
            x: input of the block.
            cond: condition of the sample.
            rows_are_guided: as in `Pass`, for a call of the forward pass itself.

        Raises:
            RuntimeError: a call of activation checkpointing, with an input that the forward pass did not have.
        """
        if torch.compiler.is_compiling():
            return _enter_uncompiled(self, block, x, cond, rows_are_guided)
        known = self._find(x)
        if computing_again():
            if block == 0:
                return Pass(None if known is None else known.rows_are_guided)
            if known is None:
                raise RuntimeError(
                    f"fixed_tokens, share_cfg_selection: expected the input that blocks[{block}] had in the forward "
                    f"pass, got another one from activation checkpointing, so its pass is not known; {ADVICE}"
                )
            return known
        if block == 0:
            current = Pass(rows_are_guided)
            self.bind(current, cond)
        else:
            known = self._find(cond) if known is None else known
            current = Pass(rows_are_guided, {} if known is None else known.tokens)
        if not x.is_inference():  # no checkpoint can keep an inference tensor
            self.bind(current, x)
        return current

    def bind(self, current: Pass, tensor: torch.Tensor) -> None:
        """Let the memory of `tensor` lead to the pass `current`."""
        if torch.compiler.is_compiling():
            return _bind_uncompiled(self, current, tensor)
        self._passes_by_memory.setdefault(_memory(tensor), {})[_place(tensor)] = current

    def _find(self, tensor: torch.Tensor) -> Pass | None:
        return self._passes_by_memory.get(_memory(tensor), {}).get(_place(tensor))

    def __deepcopy__(self, _memo) -> Passes:
        return Passes()

    def __reduce__(self):
        return Passes, ()


# A graph of one compiled block has no memory yet. The public `torch.compiler.disable` would import the compiler here.
_enter_uncompiled = torch._disable_dynamo(Passes.enter)  # pyright: ignore[reportPrivateImportUsage]
_bind_uncompiled = torch._disable_dynamo(Passes.bind)  # pyright: ignore[reportPrivateImportUsage]


def _memory(tensor: torch.Tensor) -> object:
    """Return the tensor's storage, or the tensor itself in a transform of `torch.func`, where it has none."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return tensor


def _place(tensor: torch.Tensor) -> tuple:
    """Return which part of its storage a tensor covers, and how often the storage was written to."""
    return tensor.shape, tensor.storage_offset(), None if tensor.is_inference() else tensor._version
