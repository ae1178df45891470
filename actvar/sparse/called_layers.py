"""Check which layers of a patched block are called instead of read, and say so."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from actvar.families.base import ATTENTION, FFN, NORM, PROJECTION, Called
from actvar.sparse.schedule import Scale

logger = logging.getLogger(__name__)


def expect_readable(
    index: int, called: Mapping[str, Called], schedule: Sequence[Scale], kv: str, quantized: object
) -> None:
    """Check that no operation of block number `index` has to read a layer that must be called.

    Args:
        index: number of the block, for the message.
        called: parts of the block, by `Family.parts_called`.
        schedule: scales of the block.
        kv: `ActVARConfig.kv`.
        quantized: the dtype in which the block multiplies in eight bits, or None.

    Raises:
        TypeError: an operation has to; the message names the layer, the reason, and the ways out.
    """
    selects, routes = any(scale.select for scale in schedule), any(scale.route for scale in schedule)
    reads_ffn = routes or any(scale.static for scale in schedule)
    readers = {
        NORM: "the selector and the router" if selects or routes else "the experts" if reads_ffn else None,
        ATTENTION: "attention with kv='all'" if selects and kv == "all" else None,
        FFN: "the experts" if reads_ffn else None,
    }
    way_out = "patch with rates of 1 (actvar.accelerate)"
    if quantized is not None:
        readers = dict.fromkeys((NORM, ATTENTION, PROJECTION, FFN), "products in eight bits")
        way_out = "leave Execution.weights None for this block"
    for part, reader in readers.items():
        if reader is not None and part in called:
            path, reason = called[part]
            raise TypeError(
                f"blocks[{index}].{path}: expected plain layers, which {reader} can read, got one that {reason}; merge "
                f"or remove what is around it, or {way_out}"
            )


def log_called(by_block: Sequence[Mapping[str, Called]], head: str | None) -> None:
    """Log in one line which parts are called; log nothing if there are none. Arguments are those of `called_parts`."""
    parts = called_parts(by_block, head)
    if parts:
        logger.warning("not fused, since only the layer itself computes what it is: %s", "; ".join(parts))


def called_parts(by_block: Sequence[Mapping[str, Called]], head: str | None) -> list[str]:
    """Return the parts that are called, each with the reason and the numbers of its blocks.

    Args:
        by_block: parts of every block, by `Family.parts_called`.
        head: why the head is called, or None.
    """
    blocks_by_part: dict[str, list[str]] = {}
    for index, called in enumerate(by_block):
        for path, reason in called.values():
            blocks_by_part.setdefault(f"{path} ({reason})", []).append(str(index))
    parts = [f"{part} in blocks {', '.join(blocks)}" for part, blocks in blocks_by_part.items()]
    if head is not None:
        parts.append(f"head ({head})")
    return parts
