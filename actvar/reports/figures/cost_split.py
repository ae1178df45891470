"""Figure 4: FLOPs by module; most are the FFN's."""

from __future__ import annotations

from pathlib import Path

from actvar.config import ActVARConfig
from actvar.flops import total_flops
from actvar.reports.flops import flops_report, save_plot
from actvar.utils.pictures import save_table


def figure4(folder: Path) -> list[Path]:
    """Write `figure4.png` and `figure4.csv` to a folder, and return the files.

    The table has `model, step, side, module, flops, share`, where the share is that of the model's own total.
    """
    report = flops_report("fashion-mnist", ActVARConfig(), batch=1, paper=False)
    rows = [
        (name, step, height, module, getattr(flops, module), f"{getattr(flops, module) / total_flops(steps):.5f}")
        for name, steps in report.formula.items()
        for step, ((height, _), flops) in enumerate(zip(report.maps, steps, strict=True), 1)
        for module in report.modules
    ]
    columns = ("model", "step", "side", "module", "flops", "share")
    return [save_plot(report, folder / "figure4.png"), save_table(folder / "figure4.csv", columns, rows)]
