"""Figure 3: the sequence that VAR works on grows with the square of the token map's side."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from actvar.utils.pictures import COLOURS, save_figure, save_table
from actvar.zoo.fashion_mnist.architecture import PATCH_NUMS
from actvar_kernels.operations.shapes import MODELS

SIDES = {
    "bundled model, 32x32 pixels": PATCH_NUMS,
    "VAR-d30, 256x256 pixels": MODELS["d30"].sides,
    "VAR-d36, 512x512 pixels": MODELS["d36"].sides,
}


def figure3(folder: Path) -> list[Path]:
    """Write `figure3.png` and `figure3.csv` (`model, step, side, tokens, tokens_so_far`), and return the files."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    rows = []
    for axes, (model, sides) in zip(figure.subplots(1, len(SIDES)), SIDES.items(), strict=True):
        tokens = [side * side for side in sides]
        so_far = list(accumulate(tokens))
        _draw(axes, sides, tokens, so_far)
        axes.set_title(f"{model}: {so_far[-1]:,} tokens", fontsize=10)
        rows += [(model, step, *row) for step, row in enumerate(zip(sides, tokens, so_far, strict=True), 1)]
    figure.axes[0].set_ylabel("tokens")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return [
        save_figure(figure, folder / "figure3.png"),
        save_table(folder / "figure3.csv", ("model", "step", "side", "tokens", "tokens_so_far"), rows),
    ]


def _draw(axes: Axes, sides: tuple[int, ...], tokens: list[int], so_far: list[int]) -> None:
    steps = range(1, len(sides) + 1)
    axes.bar(steps, tokens, color=COLOURS[1], label="of the step")
    axes.plot(steps, so_far, color=COLOURS[0], marker="o", markersize=3, label="of all steps so far, in the K/V cache")
    last = tokens[-1]
    axes.axhline(last, color=COLOURS[2], linestyle="--", linewidth=1, label="token by token at the same resolution")
    axes.annotate(f"{last:,}", (1, last), (0, 3), textcoords="offset points", fontsize=9, color=COLOURS[2])
    axes.annotate(f"{so_far[-1]:,}", (len(sides), so_far[-1]), (-5, 0), textcoords="offset points", ha="right",
                  va="center", fontsize=9)  # fmt: skip
    axes.set_xticks(steps, [f"{side}" for side in sides])
    axes.set_xlabel("side of the token map")
    axes.spines[["top", "right"]].set_visible(False)
