"""List every adapter behind the paper's tables: what is sparse, by which recipe, from which seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from actvar.config import ActVARConfig
from actvar.distill.recipes import RECIPES, Recipe

BATCH = 32
STEPS = {1: 100, 2: 150}
"""Steps by stage, so few that the whole list takes about three hours of one core; both recipes get the same stage 2."""
LR = {1: 3e-3, 2: 1e-3}
"""Learning rate of AdamW by stage: so few steps need more than the paper's rate."""

SEEDS = (0, 1, 2)
UNIFORM = replace(RECIPES["best"], uniform=True)
RECIPES_HERE = RECIPES | {"best-uniform": UNIFORM}


@dataclass(frozen=True)
class Training:
    """Describe one row of a table, trained once per seed.

    Args:
        row: what the table calls it.
        tables: the paper's tables and figures that it is in.
        recipe: of `RECIPES_HERE`.
        gates_of: the row of the same recipe whose stage 1 it uses; None: one of its own.
        static: a fixed set of hidden units in place of the router's choice, at the rates of the other row.
    """

    row: str
    config: ActVARConfig
    tables: tuple[str, ...]
    recipe: str = "paper"
    seeds: tuple[int, ...] = (0,)
    model: str = "fashion-mnist"
    gates_of: str | None = None
    static: bool = False

    def __post_init__(self):
        if self.recipe not in RECIPES_HERE:
            raise ValueError(f"recipe: expected one of {sorted(RECIPES_HERE)}, got {self.recipe!r}")

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.model}-{self.recipe}-{self.row}".replace(" ", "-").replace("/", "")

    @property
    def how(self) -> Recipe:
        return RECIPES_HERE[self.recipe]


def rates(before: float, last: float, ffn: float) -> ActVARConfig:
    """Return the paper's (a, b; c): token rates of the last scale but one and of the last, FFN rate of both."""
    return ActVARConfig(token_rates=(before, last), ffn_rate=ffn)


ACTVAR = ActVARConfig()
MAIN, SMALL = "ActVAR", "fashion-mnist-small"


def ablations(recipe: str) -> tuple[Training, ...]:
    """Return Tables 3, 4 and 5 under one recipe, three seeds each."""
    common = dict(recipe=recipe, seeds=SEEDS, gates_of=MAIN)
    return (
        Training(MAIN, ACTVAR, ("2", "3", "4", "5", "6", "9", "stages"), recipe, SEEDS),
        Training("without experts", rates(0.75, 0.75, 1), ("3",), **common),
        Training("without selection", rates(1, 1, 0.75), ("3",), **common),
        Training("fixed tokens", replace(ACTVAR, fixed_tokens=True), ("4",), **common),
        Training("static weights", ACTVAR, ("5",), static=True, **common),
    )


def table2(recipe: str) -> tuple[Training, ...]:
    settings = ((0.75, 0.5, 0.75), (0.5, 0.5, 0.75), (0.5, 0.75, 0.25), (0.5, 0.25, 0.5))
    return tuple(
        Training(f"rates {a:.0%} {b:.0%} {c:.0%}".replace("%", ""), rates(a, b, c), ("2",), recipe, gates_of=MAIN)
        for a, b, c in settings
    )


TRAININGS = (
    # best chooses rates per block and scale at the FLOPs of ActVAR's; in the tables of parts it keeps them uniform
    Training(MAIN, ACTVAR, ("1", "recipes"), "best", SEEDS),
    Training("static weights", ACTVAR, ("5",), "best", SEEDS, gates_of=MAIN, static=True),
    *ablations("paper"),
    *ablations("best-uniform"),
    Training("dense fine-tuned", rates(1, 1, 1), ("control",), "paper", SEEDS),
    Training(MAIN, ACTVAR, ("1",), "paper", model=SMALL),
    Training(MAIN, ACTVAR, ("1",), "best", model=SMALL),
    *table2("paper"),
    *table2("best-uniform"),
    Training("early scales", replace(ACTVAR, scales=(-4, -3)), ("6",)),
    *(Training(f"{count} experts", replace(ACTVAR, num_experts=count), ("9",)) for count in (4, 8, 32)),
    *(Training(f"{count} experts", replace(ACTVAR, num_experts=count), ("9",), "best-uniform") for count in (4, 8, 32)),
)
