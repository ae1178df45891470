"""Layers of a patched model that are called instead of read, asked when it is patched and when a sample begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from actvar.families import var as family
from actvar.sparse.schedule import Scale
from actvar.sparse.state import Shared
from actvar_kernels.cpu_backend.packing import drop_changed

logger = logging.getLogger(__name__)


def begin(block: nn.Module) -> None:
    """Look at the layers of a patched block when a sample or a teacher-forced pass begins.

    Layers that are more than their weight are called from here on, and packed copies of changed weights are dropped.

    Raises:
        TypeError: the selector, the attention or the experts would have to read such a layer.
    """
    if torch.compiler.is_compiling():  # which guards what it has seen of the layers
        return
    gates, shared = block.actvar, block.actvar.shared
    called = family.parts_called(block)
    shared.called_is_new |= called != shared.called[gates.block_index]
    shared.called[gates.block_index] = called
    if called:
        expect_readable(gates.block_index, called, gates.schedule, shared.config.kv)
    drop_changed([*family.packed_weights(block), gates.router.weight])


def begin_head(model: nn.Module, shared: Shared) -> None:
    """Do as `begin` for the head, whose turn comes last, and log in one line what is called anew."""
    if torch.compiler.is_compiling():
        return
    head = family.head_called(model)
    shared.called_is_new |= head != shared.head_called
    shared.head_called = head
    if shared.called_is_new:
        log_called(shared)
    drop_changed([model.head._parameters.get("weight")])


def expect_readable(index: int, called: Mapping[str, str], schedule: Sequence[Scale], kv: str) -> None:
    """Check that no sparse operation of block number `index` has to read a layer that must be called.

    Args:
        called: as `families.var.parts_called` gives it.

    Raises:
        TypeError: names the layer, the reason, and the ways out.
    """
    selects, routes = any(scale.select for scale in schedule), any(scale.route for scale in schedule)
    readers = {
        "ln_wo_grad": "the selector and the router" if selects or routes else None,
        "attn": "attention with kv='all'" if selects and kv == "all" else None,
        "ffn": "the experts" if routes else None,
    }
    for part, reader in readers.items():
        if reader is not None and part in called:
            raise TypeError(
                f"blocks[{index}].{part}: expected plain layers, which {reader} can read, got one that "
                f"{called[part]}; merge or remove what is around it, or patch with rates of 1 (actvar.accelerate)"
            )


def log_called(shared: Shared) -> None:
    """Log which parts are called, in one line; nothing if there are none."""
    shared.called_is_new = False
    blocks_by_part: dict[str, list[str]] = {}
    for index, called in enumerate(shared.called):
        for part, reason in called.items():
            blocks_by_part.setdefault(f"{part} ({reason})", []).append(str(index))
    parts = [f"{part} in blocks {', '.join(blocks)}" for part, blocks in blocks_by_part.items()]
    if shared.head_called is not None:
        parts.append(f"head ({shared.head_called})")
    if parts:
        logger.warning("not fused, since only the layer itself computes what it is: %s", "; ".join(parts))
