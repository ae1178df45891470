"""The report of `actvar flops`: FLOPs by module and step as text, JSON and a plot like the paper's Figure 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from actvar.config import DENSE, ActVARConfig
from actvar.families import family_of
from actvar.flops import BY_LAST_WEIGHT, MODULES, StepFlops, counted_flops, model_flops, total_flops
from actvar.models import VAR, VQVAE, build_vae_var
from actvar.patching.patch import patch_silently
from actvar.reports.paper_tables import FIXED_FLOPS_PER_ROW, ROWS, Reproduced, reproduce
from actvar.utils.pictures import COLOURS, new_figure, save_figure
from actvar.utils.progress import progress
from actvar.zoo.fashion_mnist import architecture
from actvar_kernels.operations.shapes import HEAD_DIM, MODELS

MODEL_NAMES = (*MODELS, "fashion-mnist")
AGREEMENT = 0.01
PREFIXES = {"G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of some images under guidance.

    Args:
        model: name of the model.
        batch: number of images.
        config: of ActVAR.
        maps: height and width of the token map of every scale.
        formula: by formula, scale by scale, of `dense` and `actvar`.
        counted: by torch's counter, scale by scale, of `dense` and `actvar`.
        decoder: of the autoencoder's decoder for one image.
        paper: the paper's rows, if they were asked for.
    """

    model: str
    batch: int
    config: ActVARConfig
    maps: tuple[tuple[int, int], ...]
    formula: dict[str, list[StepFlops]]
    counted: dict[str, list[StepFlops]]
    decoder: int
    paper: list[Reproduced]

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the modules that the model has, which are those of `MODULES`, without a text's where there is none."""
        has_text = any(step.cross for step in self.formula["dense"])
        return tuple(module for module in MODULES if has_text or module not in BY_LAST_WEIGHT)

    @property
    def worst_difference(self) -> float:
        """Return the largest relative difference between formula and counter in any module of any step."""
        return max(
            abs(getattr(counted, module) - getattr(formula, module)) / max(getattr(formula, module), 1)
            for name in self.formula
            for formula, counted in zip(self.formula[name], self.counted[name], strict=True)
            for module in MODULES
        )

    @property
    def saving(self) -> dict[str, float]:
        """Return the share of the transformer's FLOPs that ActVAR saves, by formula and by counter."""
        ways = {"formula": self.formula, "counted": self.counted}
        return {way: 1 - total_flops(flops["actvar"]) / total_flops(flops["dense"]) for way, flops in ways.items()}

    def tables(self, prefix: str) -> list[str]:
        """Return the lines of both tables, in FLOP with a prefix of `PREFIXES`, and what ActVAR saves."""
        lines = []
        for name, title in (("dense", "dense"), ("actvar", "ActVAR")):
            lines += self._steps_table(title, prefix, self.formula[name], self.counted[name])
        saving = self.saving
        return [
            *lines,
            f"saved by ActVAR: {saving['formula']:.2%} by formula, {saving['counted']:.2%} by counter; "
            f"formula and counter differ by at most {self.worst_difference:.2%} in any module of any step",
            "decoder of the autoencoder, counted, in none of the tables: "
            f"{self.decoder / PREFIXES[prefix]:.1f} {prefix}FLOP an image",
        ]

    def text(self) -> str:
        """Return the tables, in GFLOP and percent."""
        lines = self.tables("G")
        for table, rows in groupby(self.paper, key=lambda reproduced: reproduced.row.table):
            lines += ["", *_paper_table(table, list(rows))]
        return "\n".join(lines)

    def _steps_table(
        self, title: str, prefix: str, formula: Sequence[StepFlops], counted: Sequence[StepFlops]
    ) -> list[str]:
        """Return the lines of a table: each step by formula, their sums, and the sums by the counter."""

        def line(label: str, values: Sequence[int]) -> str:
            return f"{label:<20}" + "".join(f"{value / PREFIXES[prefix]:>10.3f}" for value in values)

        def values(steps: Sequence[StepFlops]) -> list[int]:
            return [sum(getattr(step, module) for step in steps) for module in self.modules] + [total_flops(steps)]

        names = (*self.modules, "total", "counted")
        lines = [f"{f'{title}, {prefix}FLOP':<20}" + "".join(f"{name:>10}" for name in names)]
        for number, ((height, width), step, other) in enumerate(zip(self.maps, formula, counted, strict=True), 1):
            lines.append(line(f"step {number:>2}, {height}x{width}", [*values([step]), other.total]))
        lines.append(line("all steps", [*values(formula), total_flops(counted)]))
        lines.append(line("by torch's counter", values(counted)))
        return [*lines, ""]

    def as_dict(self) -> dict[str, object]:
        """Return the report JSON-compatible; FLOPs are integers, percentages those of `Reproduced.as_dict`."""
        return {
            "model": self.model,
            "batch": self.batch,
            "config": asdict(self.config),
            "maps": self.maps,
            "formula": {name: [asdict(step) for step in steps] for name, steps in self.formula.items()},
            "counted": {name: [asdict(step) for step in steps] for name, steps in self.counted.items()},
            "saving": self.saving,
            "worst_difference": self.worst_difference,
            "decoder_per_image": self.decoder,
            "fixed_cost_per_row": FIXED_FLOPS_PER_ROW,
            "paper": [reproduced.as_dict() for reproduced in self.paper],
        }


def flops_report(model: str, config: ActVARConfig, batch: int, paper: bool) -> FlopsReport:
    """Return the FLOPs of a model, which is built without memory for its weights.

    Args:
        model: one of `MODEL_NAMES`.
        config: of ActVAR.
        batch: number of images.
        paper: compute the paper's rows too.

    Raises:
        ValueError: a configuration that does not fit the model.
    """
    vae, var = shapes_of(model)
    formula, counted = {}, {}
    for name, patch_config in progress({"dense": DENSE, "actvar": config}.items(), desc="counting", leave=False):
        patch_silently(var, patch_config)
        formula[name], counted[name] = model_flops(var, batch), counted_flops(var, batch)
    rows = reproduce({name: shapes_of(name)[1] for name in {row.model for row in ROWS}}) if paper else []
    return FlopsReport(
        model,
        batch,
        config,
        family_of(var).maps(var),
        formula,
        counted,
        decoder_flops(vae),
        rows,
    )


def shapes_of(model: str) -> tuple[VQVAE, VAR]:
    """Return autoencoder and transformer of one of `MODEL_NAMES` on the meta device."""
    if model == "fashion-mnist":
        return architecture.build(device="meta")
    width, sides = MODELS[model]
    return build_vae_var(depth=width // HEAD_DIM, patch_nums=sides, shared_aln=model == "d36", device="meta")


@torch.no_grad()
def decoder_flops(vae: VQVAE) -> int:
    """Return the FLOPs of decoding one image by torch's counter, for a `vae` on the meta device."""
    side = vae.quantize.v_patch_nums[-1]
    with FlopCounterMode(display=False) as counter:
        vae.fhat_to_img(torch.empty(1, vae.Cvae, side, side, device="meta"))
    return counter.get_total_flops()


def _paper_table(table: int, rows: Sequence[Reproduced]) -> list[str]:
    fixed = f"+{FIXED_FLOPS_PER_ROW // 10**9} GFLOP a row"
    head = f"Table {table}, % saved"
    lines = [f"{head:<20}{'model':>6}{'paper':>8}{'transformer':>14}{'dev.':>7}{fixed:>18}{'dev.':>7}{'Eq. 12':>9}"]
    for reproduced in rows:
        row, values = reproduced.row, reproduced.as_dict()
        lines.append(
            f"{row.name:<20}{row.model:>6}{row.saving:>8.1f}"
            f"{reproduced.transformer:>14.1f}{values['transformer_deviation']:>+7.1f}"
            f"{reproduced.with_fixed_cost:>18.1f}{values['with_fixed_cost_deviation']:>+7.1f}"
            f"{reproduced.equation_12:>9.1f}"
        )
    return lines


def save_plot(report: FlopsReport, path: Path) -> Path:
    """Write a PNG with the FLOPs by module over all steps, and by step, of the dense model beside ActVAR."""
    figure = new_figure(10, 4)
    by_module, by_step = figure.subplots(1, 2, width_ratios=(1, 2))
    steps = range(1, len(report.maps) + 1)
    modules = report.modules
    labels = [f"{step}\n{height}x{width}" for step, (height, width) in zip(steps, report.maps, strict=True)]
    for name, offset, hatch in (("dense", -0.2, ""), ("actvar", 0.2, "///")):
        formula = report.formula[name]
        sums = [sum(getattr(step, module) for step in formula) / 1e9 for module in modules]
        bottom = [0.0] * len(formula)
        for place, module in enumerate(modules):
            style = dict(color=COLOURS[place % len(COLOURS)], hatch=hatch, edgecolor="white", linewidth=0.3)
            bar = by_module.bar(place + offset, sums[place], 0.4, **style)
            by_module.bar_label(bar, [f"{sums[place] / sum(sums):.1%}"], fontsize=6, rotation=90, padding=2)
            heights = [getattr(step, module) / 1e9 for step in formula]
            label = module if name == "dense" else None
            by_step.bar([step + offset for step in steps], heights, 0.4, bottom=bottom, label=label, **style)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    by_module.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
    by_module.set_ylabel("GFLOP")
    by_module.margins(y=0.15)
    by_module.set_title("all steps, and share of the run", fontsize=9)
    by_step.set_xticks(steps, labels)
    by_step.set_xlabel("step, token map")
    by_step.legend(fontsize=8)
    by_step.set_title("by step: dense, and ActVAR hatched", fontsize=9)
    figure.suptitle(f"{report.model}: FLOPs of {report.batch} image{'s' * (report.batch > 1)} by module", fontsize=10)
    return save_figure(figure, path)
