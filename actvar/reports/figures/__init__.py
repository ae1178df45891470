"""The paper's figures, drawn on the bundled model: each is a module with a function from a folder to the files."""

from actvar.reports.figures.active_tokens import figure6
from actvar.reports.figures.cost_split import figure4
from actvar.reports.figures.expert_preference import figure5
from actvar.reports.figures.samples import figures7and8
from actvar.reports.figures.sequence_length import figure3

FIGURES = {"3": figure3, "4": figure4, "5": figure5, "6": figure6, "7-8": figures7and8}

__all__ = ["FIGURES", "figure3", "figure4", "figure5", "figure6", "figures7and8"]
