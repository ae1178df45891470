"""Write our tables beside the paper's, from the CSV alone: `docs/paper.md`, with a plot of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from actvar.evaluate.report import Mean
from actvar.utils.pictures import COLOURS, save_figure
from benchmarks.paper.measure import DENSE, Measured
from benchmarks.paper.published import TABLES, Claim, Line, Table
from benchmarks.paper.recipes import STEPS as RECIPE_STEPS
from benchmarks.paper.recipes import read_rows
from benchmarks.paper.trainings import BATCH, STEPS

MISSING = "not measured yet"
INTRODUCTION = f"""# The paper's tables and figures, on the bundled models

Written by `make paper` from [paper/results.csv](paper/results.csv), in which it replaces the rows of the adapters that
`make paper-train` left in `paper-work/`.
Fashion-MNIST in place of ImageNet, a transformer of 3.1 M parameters (1.0 M the small one) in place of 310 M to 2 B,
and {STEPS[1]} + {STEPS[2]} steps of {BATCH} images in place of 2 + 10 epochs: what can be compared is which row is
ahead, not the figures themselves.

Recipe `paper` is the paper's training; `best-uniform` has the same rates in every block, experts of clustered hidden
units, gates fitted in closed form, and a stage 2 that imitates the logits alone, by Muon; `best` chooses rates per
block and scale at the same FLOPs besides. Rows at other rates, with fixed tokens or static weights have the gates of
the row `ActVAR` of their recipe and seed; stage 2 is their own. Static weights are the hidden units that Wanda ranks
highest, fixed tokens those that the first block selects.

KL is to the dense logits, in nats, over all tokens (and at 8x8), on token maps of 200 test images; FID and IS by the
bundled feature network, a dash where no images were drawn. Intervals are 95 % by Student's t over the seeds of training
and sampling; a single number is one seed. A claim is judged by KL and by FID: *agrees* and *disagrees* where the paired
difference is beyond its interval, else *within noise*, and *one seed* where there is no interval.
"""
FIGURES = """## Figures

| | |
|---|---|
| Figure 3: sequence length per scale | [figure3.png](paper/figure3.png) |
| Figure 4: FLOPs by module | [figure4.png](paper/figure4.png) |
| Figure 5: expert preference by step and class | [figure5.png](paper/figure5.png) |
| Figure 6: updated tokens per block | [figure6.png](paper/figure6.png) |
| Figures 7 and 8: samples side by side | [figure7.png](paper/figure7.png), [figure8.png](paper/figure8.png) |

(`python -m actvar.reports.figures`)
"""


@dataclass(frozen=True)
class Rows:
    """Find what was measured for a line of a table."""

    measured: Sequence[Measured]

    def of(self, line: Line, recipe: str) -> list[Measured]:
        """Return one row per seed, in their order; none where nothing was measured."""
        wanted = ("", DENSE, 0) if line.row == DENSE else (recipe, line.row, line.stage)
        found = [m for m in self.measured if m.model == line.model and (m.recipe, m.row, m.stage) == wanted]
        return sorted(found, key=lambda m: m.seed)

    def saved(self, rows: Sequence[Measured]) -> str:
        """Return the share of the dense model's FLOPs that is saved."""
        dense = next(m.flops for m in self.measured if m.model == rows[0].model and m.row == DENSE)
        return f"{1 - rows[0].flops / dense:.1%}"


def write_page(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Write `paper.md` into `folder` and `<table>.png` into `folder/paper`; return the files."""
    rows, pictures = Rows(measured), []
    for table in TABLES:
        picture = _plot(table, rows)
        if picture is not None:
            pictures.append(save_figure(picture, folder / "paper" / f"{table.name}.png"))
    page = folder / "paper.md"
    page.write_text(page_text(measured, read_rows(folder / "paper" / "recipes.csv")), encoding="utf-8")
    return [page, *pictures]


def page_text(measured: Sequence[Measured], recipes: Sequence[Sequence[str]]) -> str:
    """Return the page: a part per table, then `recipes`, the rows of recipes.csv."""
    rows, parts = Rows(measured), [INTRODUCTION]
    for table in TABLES:
        parts.append(f"## {table.title}\n\n{_text(table, rows)}")
        if any(rows.of(line, recipe) for line in table.lines if line.row != DENSE for recipe in table.recipes):
            parts.append(f"![{table.title}](paper/{table.name}.png)\n")
    return "\n".join([*parts, _recipes(recipes), FIGURES])


def _text(table: Table, rows: Rows) -> str:
    titles = [
        "paper",
        "FLOPs saved",
        "FID",
        "IS",
        "ours",
        "recipe",
        "FLOPs saved",
        "KL",
        "at 8x8",
        "FID",
        "IS",
        "seeds",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for line in table.lines:
        printed = [line.printed, *("-" if v is None else f"{v:g}" for v in (line.saved, line.fid, line.inception))]
        name = f"{line.row}, small" if line.model.endswith("small") else line.row
        for recipe in table.recipes[: 1 if line.row == DENSE else None]:
            found = rows.of(line, recipe)
            cells = [name, "" if line.row == DENSE else recipe]
            if found:
                cells += [rows.saved(found), *(_mean(found, field) for field in ("kl", "kl_last", "fid", "inception"))]
                cells.append(str(len(found)))
            else:
                cells += [MISSING, *[""] * 5]
            lines.append("| " + " | ".join(printed + cells) + " |")
            printed = [""] * 4
    verdicts = [_verdict(table, claim, recipe, rows) for claim in table.claims for recipe in table.recipes]
    return "\n".join([*lines, "", *verdicts, ""])


def _recipes(rows: Sequence[Sequence[str]]) -> str:
    """Return the table that decides `best`: mean over the seeds, and the seeds' own values at 8x8."""
    titles = ["choice", "FLOPs of blocks saved", "KL of the gates, 6x6", "8x8", "after stage 2, 6x6", "8x8"]
    titles += ["seeds at 8x8"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name in dict.fromkeys(row[0] for row in rows):
        values = np.array([[float(value) for value in row[2:]] for row in rows if row[0] == name])
        saved, *divergences = values.mean(axis=0)
        seeds = ", ".join(f"{value:.3f}" for value in values[:, -1])
        lines.append("| " + " | ".join([name, f"{saved:.1%}", *(f"{kl:.3f}" for kl in divergences), seeds]) + " |")
    about = f"""## Which recipe

KL to the dense logits after {RECIPE_STEPS} steps of stage 2 with {BATCH} images; up to `best` each line adds one choice
to the line above (`python -m benchmarks.paper.recipes`).
"""
    return "\n".join([about, *(lines if rows else [f"{MISSING.capitalize()}."]), ""])


def _mean(rows: Sequence[Measured], field: str) -> str:
    values = [getattr(row, field) for row in rows if getattr(row, field) is not None]
    return str(Mean.of(values)) if values else "-"


def _verdict(table: Table, claim: Claim, recipe: str, rows: Rows) -> str:
    lines = f"{table.lines[claim.better].printed} against {table.lines[claim.worse].printed}"
    start = f"- *{claim.text}* ({lines}; recipe `{recipe}`): "
    better, worse = (rows.of(table.lines[i], recipe) for i in (claim.better, claim.worse))
    kl, fid = (_judged(better, worse, field) for field in ("kl", "fid"))
    if kl is None:
        return start + MISSING + "."
    return f"{start}{kl[0]} by KL, which differs by {kl[1]}" + (f"; {fid[0]} by FID, {fid[1]}." if fid else ".")


def _judged(better: Sequence[Measured], worse: Sequence[Measured], field: str) -> tuple[str, Mean] | None:
    """Return whether `better` is ahead in `field` over the seeds of both, and by how much; None without such seeds."""
    ours, theirs = ({m.seed: getattr(m, field) for m in of if getattr(m, field) is not None} for of in (better, worse))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    difference = Mean.of([theirs[seed] - ours[seed] for seed in seeds])
    word = "agrees" if difference.mean > 0 else "disagrees"
    if difference.interval is None:
        return f"**{word}, one seed**", difference
    return ("**within noise**" if abs(difference.mean) <= difference.interval else f"**{word}**"), difference


def _plot(table: Table, rows: Rows) -> Figure | None:
    """Draw KL of every line, a bar per recipe with the seeds as points; None where nothing was measured."""
    lines = [line for line in table.lines if line.row != DENSE]
    found = {recipe: [rows.of(line, recipe) for line in lines] for recipe in table.recipes}
    if not any(of_line for of_recipe in found.values() for of_line in of_recipe):
        return None
    figure = Figure(figsize=(1.6 + 1.3 * len(lines), 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    for number, (recipe, of_lines) in enumerate(found.items()):
        for place, of_line in enumerate(of_lines):
            if of_line:
                x, values = place + (number - (len(found) - 1) / 2) * width, [row.kl for row in of_line]
                label = recipe if place == next(i for i, rows_ in enumerate(of_lines) if rows_) else None
                axes.bar(x, np.mean(values), 0.9 * width, color=COLOURS[number], label=label)
                axes.plot([x] * len(values), values, ".", color="black", markersize=4)
    names = [line.row + (", small" if line.model.endswith("small") else "") for line in lines]
    if table.name == "stages":
        names = [line.printed for line in lines]
    axes.set_xticks(range(len(lines)), names, fontsize=8)
    axes.set(ylabel="KL to dense, all tokens", title=table.title)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7)
    return figure
