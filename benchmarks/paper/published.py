"""Hold what the paper's tables say, and which of our rows stand beside which of theirs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.paper.trainings import MAIN, SMALL

BASE = "fashion-mnist"


@dataclass(frozen=True)
class Line:
    """Name a line of a table: our `row` of `model`, the paper's name for it and its figures; None where it gives none.

    `saved` is in percent of FLOPs. The row `dense` is the model without an adapter, `stage` the adapter's.
    """

    row: str
    printed: str
    saved: float | None = None
    fid: float | None = None
    inception: float | None = None
    model: str = BASE
    stage: int = 2


@dataclass(frozen=True)
class Claim:
    """Say that `better` is ahead of `worse`, each a number of a line; `text` says it in words."""

    better: int
    worse: int
    text: str


@dataclass(frozen=True)
class Table:
    """Name a table of the paper, or one more about its method; `recipes` in the order of the columns."""

    name: str
    title: str
    lines: tuple[Line, ...]
    claims: tuple[Claim, ...]
    recipes: tuple[str, ...] = ("paper", "best-uniform")


_D20 = (21.2, 2.72, 290.4)

TABLES = (
    Table(
        "table1",
        "Table 1: two model sizes",
        (
            Line("dense", "VAR-d16", 0.0, 3.30, 274.4, SMALL),
            Line(MAIN, "ActVAR-d16", 20.2, 3.51, 273.5, SMALL),
            Line("dense", "VAR-d20", 0.0, 2.57, 302.6),
            Line(MAIN, "ActVAR-d20", *_D20),
        ),
        (),
        ("paper", "best"),
    ),
    Table(
        "table2",
        "Table 2: activation rates",
        (
            Line("rates 50 25 50", "(50%, 25%; 50%)", 43.2, 3.30, 256.8),
            Line("rates 50 75 25", "(50%, 75%; 25%)", 39.9, 3.21, 265.1),
            Line("rates 50 50 75", "(50%, 50%; 75%)", 32.8, 2.92, 274.1),
            Line("rates 75 50 75", "(75%, 50%; 75%)", 28.2, 2.89, 277.1),
            Line(MAIN, "(75%, 75%; 75%)", *_D20),
        ),
        tuple(Claim(i + 1, i, "the higher rates are better") for i in range(4)),
    ),
    Table(
        "table3",
        "Table 3: without experts, without selection",
        (
            Line("without experts", "w/o DW", 14.2, 2.67, 290.5),
            Line("without selection", "w/o AT", 9.4, 2.70, 288.6),
            Line(MAIN, "w/ DW & AT", *_D20),
        ),
        (Claim(0, 2, "leaving out the experts is a little better"), Claim(1, 2, "so is leaving out the selection")),
    ),
    Table(
        "table4",
        "Table 4: fixed against dynamic tokens",
        (Line("fixed tokens", "fixed token pruning", None, 3.83, 242.4), Line(MAIN, "dynamic activating token", *_D20)),
        (Claim(1, 0, "dynamic tokens are better than fixed ones"),),
    ),
    Table(
        "table5",
        "Table 5: static against dynamic weights",
        (
            Line("static weights", "static weight pruning", None, 3.04, 274.2),
            Line(MAIN, "dynamic weight activation", *_D20),
        ),
        (Claim(1, 0, "dynamic weights are better than static pruning"),),
        ("paper", "best-uniform", "best"),
    ),
    Table(
        "table6",
        "Table 6: which scales",
        (Line("early scales", "steps (7, 8)", 8.1, 2.82, 282.7), Line(MAIN, "steps (9, 10)", *_D20)),
        (Claim(1, 0, "the last two scales bear it better"),),
        ("paper",),
    ),
    Table(
        "figure9",
        "Figure 9: number of experts",
        (
            Line("4 experts", "4"),
            Line("8 experts", "8"),
            Line(MAIN, "16", *_D20),
            Line("32 experts", "32"),
        ),
        (Claim(2, 0, "16 experts are better than 4"), Claim(2, 3, "16 experts are better than 32")),
    ),
    Table(
        "stages",
        "Stage 1 against stages 1 and 2",
        (Line(MAIN, "stage 1", stage=1), Line(MAIN, "stages 1 and 2", *_D20)),
        (Claim(1, 0, "stage 2 is worth it"),),
        ("paper", "best-uniform", "best"),
    ),
    Table(
        "control",
        "Control: the dense model, trained on as long as stage 2",
        (Line("dense", "VAR-d20", 0.0, 2.57, 302.6), Line("dense fine-tuned", "-")),
        (),
        ("paper",),
    ),
)
