"""The result of planning: the chosen plan, and the curve of all plans that were measured."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from actvar.calibrate.goal import Goal
from actvar.config import ActVARConfig, Rate
from actvar.execution import Execution
from actvar.utils.pictures import new_figure, save_figure, save_table


@dataclass(frozen=True)
class Candidate:
    """A configuration with what it costs.

    Args:
        config: rates of every block, and the ends of guidance and of sampling.
        seconds: predicted for a batch.
        divergence: KL to the dense model's guided logits in nats, mean over the tokens of each scale that the plan
            changes, then over these scales; 0 for the dense model. A scale that is left out counts as the uniform
            distribution.
        total: the same summed over the scales.
        execution: how the plan is run.
    """

    config: ActVARConfig
    seconds: float
    divergence: float
    total: float
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True)
class PlanReport:
    """The result of planning.

    Args:
        goal: what was asked for.
        chosen: the plan that the model is patched with.
        is_met: whether the chosen plan is one that was asked for; otherwise it is the nearest.
        curve: all plans that were measured, the fastest last.
        accelerated_ms, measured_ms: of a batch on this machine without the plan and with it, measured in turn.
        predicted_ms: of a batch with the plan, in proportion to `accelerated_ms`.
    """

    goal: Goal
    chosen: Candidate
    is_met: bool
    curve: tuple[Candidate, ...]
    accelerated_ms: float
    predicted_ms: float
    measured_ms: float

    def describe(self) -> str:
        """Return a line about the plan's times and divergence."""
        return (
            f"{self.accelerated_ms / self.measured_ms:.2f}x over accelerated "
            f"({self.accelerated_ms:.1f} -> {self.measured_ms:.1f} ms a batch, predicted {self.predicted_ms:.1f}), "
            f"KL {self.chosen.divergence:.4f}, products of the blocks in "
            f"{self.chosen.execution.weights or 'their own dtype'}"
        )

    def facts(self) -> dict[str, object]:
        """Return goal, times and divergence of the chosen plan, JSON-compatible."""
        goal: dict[str, object] = {name: value for name, value in asdict(self.goal).items() if value is not None}
        times: dict[str, object] = {
            name: round(getattr(self, name), 3) for name in ("accelerated_ms", "predicted_ms", "measured_ms")
        }
        return goal | times | {"kl": self.chosen.divergence}

    def as_dict(self) -> dict[str, object]:
        """Return `facts`, the plan and the curve, JSON-compatible."""
        return self.facts() | {"config": asdict(self.chosen.config), "curve": [self._row(each) for each in self.curve]}

    def _row(self, candidate: Candidate) -> dict[str, object]:
        config = candidate.config
        return {
            "predicted_ms": round(1e3 * candidate.seconds, 3),
            "kl": candidate.divergence,
            "kl_total": candidate.total,
            "guidance_until": config.guidance_until,
            "scales_until": config.scales_until,
            "static_experts": config.static_experts,
            "weights": candidate.execution.weights,
            "token_rates": [_mean(rate) for rate in config.token_rates],
            "ffn_rates": [_mean(rate) for rate in config.ffn_rates],
        }

    def save_curve(self, table: Path, picture: Path) -> None:
        """Write all plans as CSV, and plot their divergence over their time as PNG, with the chosen one marked."""
        rows = [self._row(each) for each in self.curve]
        save_table(table, [*rows[0]], [[*row.values()] for row in rows])
        figure = new_figure(5, 3.4)
        axis = figure.subplots()
        axis.plot([1e3 * each.seconds for each in self.curve], [each.total for each in self.curve], "o", markersize=3)
        axis.plot([1e3 * self.chosen.seconds], [self.chosen.total], "s", label="chosen")
        axis.axvline(self.accelerated_ms, linewidth=0.8, color="grey", label="accelerated")
        axis.set(xlabel="ms per batch, predicted", ylabel="KL to dense, sum over scales")
        axis.legend()
        save_figure(figure, picture)


def _mean(rate: Rate) -> float:
    """Return the mean of a scale's rates over the blocks."""
    return round(statistics.fmean(rate), 4) if isinstance(rate, tuple) else rate
