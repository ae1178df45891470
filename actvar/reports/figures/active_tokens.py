"""Figure 6: the tokens that each block updates, drawn over the image, and how much of it they cover together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from actvar.reports.token_overlay import save_token_overlay, times_updated
from actvar.sampling.request import Sampling
from actvar.sparse.state import BlockRecord, record
from actvar.utils.pictures import save_table
from actvar.zoo import load_pretrained
from actvar.zoo.fashion_mnist.data import CLASSES

SHOWN = (1, 3, 7, 8, 9)
"""Classes in the picture; the table has all."""


def figure6(folder: Path, adapter: str = "paper", per_class: int = 8) -> list[Path]:
    """Write `figure6.png`, an image per class of `SHOWN`, and `figure6.csv` (`class, step, block, updated, covered,
    covered_at_random`): shares of the tokens that the block updates, that this block and those before it reach
    together, and that as many tokens drawn at random would, means over `per_class` images.

    Args:
        adapter: of the bundled model, one that selects tokens.
    """
    _, var = load_pretrained("fashion-mnist", adapter)
    labels = tuple(label for label in range(len(CLASSES)) for _ in range(per_class))
    with record(var) as records:
        images = Sampling(labels).run(var)
    first_of_class = [label * per_class for label in SHOWN]
    picture = save_token_overlay(
        images[first_of_class],
        [of_block.only(first_of_class) for of_block in records],
        folder / "figure6.png",
        [CLASSES[label] for label in SHOWN],
    )
    columns = ("class", "step", "block", "updated", "covered", "covered_at_random")
    return [picture, save_table(folder / "figure6.csv", columns, _coverage(records, labels))]


def _coverage(records: Sequence[BlockRecord], labels: Sequence[int]) -> Iterator[tuple]:
    for scale in sorted({of_block.scale.index for of_block in records}):
        of_scale = sorted((r for r in records if r.scale.index == scale), key=lambda of_block: of_block.block)
        for label in sorted(set(labels)):
            rows = [row for row, of_row in enumerate(labels) if of_row == label]
            missed_at_random = 1.0
            for count, of_block in enumerate(of_scale, 1):
                updated = (times_updated([of_block.only(rows)]) > 0).float().mean().item()
                covered = (times_updated([r.only(rows) for r in of_scale[:count]]) > 0).float().mean().item()
                missed_at_random *= 1 - updated
                shares = (updated, covered, 1 - missed_at_random)
                yield CLASSES[label], scale + 1, of_block.block + 1, *(f"{share:.4f}" for share in shares)
