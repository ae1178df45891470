"""Figure 6: the tokens that each block updates, drawn over the image, and how much of it they cover together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from actvar.reports.token_overlay import save_token_overlay, times_updated
from actvar.sampling.request import Sampling
from actvar.sparse.contexts import record
from actvar.sparse.record import BlockRecord
from actvar.utils.pictures import save_table
from actvar.zoo import load_pretrained
from actvar.zoo.fashion_mnist.data import CLASSES

SHOWN = (1, 3, 7, 8, 9)
"""Classes in the picture; the table has all."""


def figure6(folder: Path, adapter: str = "paper", per_class: int = 8) -> list[Path]:
    """Write `figure6.png`, an image per class of `SHOWN`, and `figure6.csv`.

    The table has `class, step, block, updated, covered, covered_at_random`. The last three are shares of the tokens,
    means over `per_class` images: those that the block updates, those that this block and the ones before it update
    together, and those that as many random choices would reach.

    Args:
        folder: of the files.
        adapter: of the bundled model, one that selects tokens.
        per_class: images drawn of each class.

    Returns:
        The files.
    """
    _, var = load_pretrained("fashion-mnist", adapter)
    labels = tuple(label for label in range(len(CLASSES)) for _ in range(per_class))
    with record(var) as records:
        images = Sampling(labels).run(var)
    first_of_class = [label * per_class for label in SHOWN]
    picture = save_token_overlay(
        images[first_of_class],
        [block_record.only(first_of_class) for block_record in records],
        folder / "figure6.png",
        [CLASSES[label] for label in SHOWN],
    )
    columns = ("class", "step", "block", "updated", "covered", "covered_at_random")
    return [picture, save_table(folder / "figure6.csv", columns, _coverage(records, labels))]


def _coverage(records: Sequence[BlockRecord], labels: Sequence[int]) -> Iterator[tuple]:
    """Yield the rows of the table."""
    for scale in sorted({r.scale.index for r in records}):
        scale_records = sorted((r for r in records if r.scale.index == scale), key=lambda r: r.block)
        for label in sorted(set(labels)):
            rows = [row for row, row_label in enumerate(labels) if row_label == label]
            missed_at_random = 1.0
            for count, block_record in enumerate(scale_records, 1):
                updated = (times_updated([block_record.only(rows)]) > 0).float().mean().item()
                covered = (times_updated([r.only(rows) for r in scale_records[:count]]) > 0).float().mean().item()
                missed_at_random *= 1 - updated
                shares = (updated, covered, 1 - missed_at_random)
                yield CLASSES[label], scale + 1, block_record.block + 1, *(f"{share:.4f}" for share in shares)
